"""The formats against bitsandbytes itself, the laws that its own layout breaks, and the plugin's claims."""

import bitsandbytes.functional as bitsandbytes
import pytest
import torch
from arctic_plugins_bnb import ops
from arctic_plugins_bnb.codec import LARGEST_WEIGHT, Int8Codec, NF4Codec, _rows
from arctic_plugins_bnb.config import BnBConfig
from arctic_plugins_bnb.plugin import BnB

from arctic_plugins import Stack
from arctic_plugins.claims import LinearSpec
from arctic_plugins.errors import CheckpointError, ClaimError, CodecError, ConfigError
from arctic_plugins.frozen import codec_from_dict

NF4, DOUBLE, INT8 = NF4Codec(), NF4Codec(double_quant=True), Int8Codec()
CODECS = [NF4, DOUBLE, INT8]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.describe())


def drawn(*shape, dtype=torch.float32, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (weight * torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_is_bitsandbytes_bit_for_bit(dtype):
    weight = drawn(300, 2048, dtype=dtype)  # several tiles, the last one cut off
    expected, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4")
    buffers = NF4.encode(weight)
    assert torch.equal(buffers[""].flatten(), expected.flatten())
    assert torch.equal(buffers["_absmax"].flatten(), state.absmax)
    for state.dtype in DTYPES:
        decoded = bitsandbytes.dequantize_4bit(expected, state)
        assert torch.equal(NF4.decode(buffers, (300, 2048), state.dtype), decoded)


def test_a_row_that_is_not_whole_blocks_is_bitsandbytes_padded():
    weight = drawn(5, 100)
    expected, state = bitsandbytes.quantize_4bit(torch.nn.functional.pad(weight, (0, 28)), quant_type="nf4")
    assert torch.equal(NF4.encode(weight)[""].flatten(), expected.flatten())
    decoded = bitsandbytes.dequantize_4bit(expected, state)[:, :100]
    assert torch.equal(NF4.decode(NF4.encode(weight), (5, 100), torch.float32), decoded)


def test_double_quantization_of_one_row_is_bitsandbytes():
    weight = drawn(1, 256 * 64) * torch.linspace(0.1, 2, 256 * 64)
    expected, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    buffers = DOUBLE.encode(weight)
    assert torch.equal(buffers[""].flatten(), expected.flatten())
    assert torch.equal(buffers["_absmax_scale"].flatten(), state.state2.absmax)
    assert torch.equal(buffers["_absmax_offset"].flatten(), state.offset[None])
    found, theirs = buffers["_absmax"].flatten().int(), state.absmax.int()
    assert (found - theirs).abs().max() <= 1  # its CPU kernel takes the second nearest number if the two are as near
    assert (found != theirs).float().mean() < 0.02
    decoded = bitsandbytes.dequantize_4bit(expected, state).view(1, -1)  # it gives a row back transposed
    same_codes = {**buffers, "_absmax": state.absmax[None]}
    assert torch.equal(DOUBLE.decode(same_codes, tuple(weight.shape), torch.float32), decoded)


def test_double_quantization_by_rows_is_no_worse_than_that_of_the_whole_weight():
    weight = drawn(512, 1024)
    state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    theirs = (bitsandbytes.dequantize_4bit(*state) - weight).norm()
    assert (DOUBLE.decode(DOUBLE.encode(weight), (512, 1024), torch.float32) - weight).norm() <= theirs


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_bitsandbytes_bit_for_bit(dtype):
    weight = drawn(300, 2048, dtype=dtype)
    codes, absmax, _ = bitsandbytes.int8_vectorwise_quant(weight)
    buffers = INT8.encode(weight)
    assert torch.equal(buffers[""].squeeze(1), codes)
    assert torch.equal(buffers["_absmax"].squeeze(1), absmax)
    decoded = INT8.decode(buffers, (300, 2048), torch.float32)
    assert torch.equal(decoded, bitsandbytes.int8_vectorwise_dequant(codes, absmax))


@codecs
def test_rows_and_experts_are_encoded_on_their_own(codec):
    weight = drawn(3, 40, 200)
    whole = codec.encode(weight)
    for expert, first, last in ((0, 0, 40), (1, 7, 8), (2, 13, 40)):
        for suffix, buffer in codec.encode(weight[expert, first:last]).items():
            assert torch.equal(buffer, whole[suffix][expert, first:last]), suffix


@codecs
def test_zeros_tiny_and_large_weights(codec):
    weight = torch.zeros(4, 128)
    weight[1, ::7], weight[2], weight[3, 5] = LARGEST_WEIGHT, 1e-30 * torch.randn(128), -LARGEST_WEIGHT
    decoded = codec.decode(codec.encode(weight), (4, 128), torch.float32)
    assert torch.equal(decoded[0], weight[0])
    assert ((decoded - weight).norm(dim=1) <= 0.1 * weight.norm(dim=1)).all()


@codecs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2 * LARGEST_WEIGHT])
def test_what_cannot_be_represented_is_refused(codec, bad):
    weight = torch.randn(4, 64)
    weight[2, 3] = bad
    with pytest.raises(CodecError, match=r"NaN, Inf or a value outside the range of bnb.*at most 1\.3e\+30"):
        codec.encode(weight)


@codecs
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(48, 128), (33, 100)], ids=str)
def test_products_are_those_of_the_decoded_weight(codec, dtype, shape):
    buffers = codec.encode(torch.randn(shape))
    weight = codec.decode(buffers, shape, torch.float64)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6}.get(dtype, 0.02)
    for lead in ((1,), (2, 3), (40,), (0,)):
        x, grad = torch.randn(*lead, shape[1], dtype=dtype), torch.randn(*lead, shape[0], dtype=dtype)
        for found, expected in (
            (codec.linear(x, buffers, shape), x.double() @ weight.T),
            (codec.grad_input(grad, buffers, shape), grad.double() @ weight),
        ):
            assert found.dtype == dtype
            assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("codec", [NF4, DOUBLE], ids=str)
def test_what_a_gpu_calls_computes_the_same(codec, monkeypatch):
    """bitsandbytes' ``gemm_4bit`` in its version for CPU; its kernels for CUDA have never run here."""
    buffers, x = codec.encode(torch.randn(48, 128)), torch.randn(2, 3, 128)
    monkeypatch.setattr(ops, "_has_fused_nf4", lambda x: True)
    found = ops._linear_nf4(x, *_rows(buffers), 128)
    torch.testing.assert_close(found, codec.linear(x, buffers, (48, 128)))


def test_bytes():
    assert NF4.nbytes((1536, 576)) == 1536 * 576 // 2 + 1536 * 9 * 4
    assert DOUBLE.nbytes((1536, 576)) == 1536 * 576 // 2 + 1536 * (9 + 8)
    assert INT8.nbytes((1536, 576)) == 1536 * 576 + 1536 * 4


MODULES = {
    "model.layers.0.mlp.up_proj": LinearSpec(8, 4),
    "model.layers.0.mlp.gate": LinearSpec(8, 4),
    "lm_head": LinearSpec(8, 4, tied=True),
}


def claims(**options):
    return {claim.module: claim.value for claim in BnB(BnBConfig(**options)).claim(modules=MODULES)}


def test_claims():
    assert claims() == {"model.layers.0.mlp.up_proj": NF4}
    assert claims(double_quant=True) == {"model.layers.0.mlp.up_proj": DOUBLE}
    assert claims(type="int8", include=["**.gate"], exclude=[]) == {"model.layers.0.mlp.gate": INT8}
    with pytest.raises(ClaimError, match=r"plugins\.bnb includes lm_head, whose weight is tied to the embedding"):
        claims(exclude=[])
    with pytest.raises(ClaimError, match=r"plugins\.bnb\.include 'model\.layer\.0' matches no linear module"):
        claims(include=["model.layer.0"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "fp4"}, r"plugins\.bnb\.type is 'fp4'; expected 'nf4' or 'int8'"),
        ({"type": "int8", "double_quant": True}, "double_quant requires type 'nf4'"),
        ({"double_quants": True}, "did you mean 'double_quant'"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        Stack.from_dict({"bnb": options})


@pytest.mark.parametrize("config", [{"type": "bnb-nf4", "double_quant": 1}, {"type": "bnb-int8", "double_quant": True}])
def test_bad_checkpoints_are_told(config):
    with pytest.raises(CheckpointError, match="is not valid"):
        codec_from_dict(config)
