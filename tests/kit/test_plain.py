"""The codec of plain weights keeps the laws of codecs that do not concern checkpoints."""

from arctic_plugins.frozen import PlainCodec
from arctic_plugins.testing import CodecSuite


class TestPlainCodec(CodecSuite):
    codecs = [PlainCodec(dtype) for dtype in ("float32", "bfloat16", "float16")]
    tolerance = 0.003

    test_codes_do_not_have_the_shape_of_the_weight = None  # checkpoints contain the weight itself
    test_nan_and_inf_are_refused = None  # they stay as they are
    test_encoding_keeps_no_reference_to_the_weight = None  # it is the weight
