"""FP8 against the format's definition, on every code and on awkward weights."""

import pytest
import torch
from arctic_plugins_fp8.codec import BLOCK, FP8Codec
from arctic_plugins_fp8.config import FP8Config
from arctic_plugins_fp8.plugin import FP8

from arctic_plugins.claims import LinearSpec
from arctic_plugins.errors import CheckpointError, ClaimError, CodecError
from arctic_plugins.frozen import codec_from_dict, codec_to_dict
from arctic_plugins.testing import check_codec

CODECS = [FP8Codec(), FP8Codec(group_size=32), FP8Codec(group_size=100), FP8Codec(group_size=128)]


def e4m3(code):
    """The value of a code by the definition of OCP e4m3, in Python's arithmetic."""
    sign, exponent, mantissa = -1 if code & 0x80 else 1, (code >> 3) & 0xF, code & 7
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


FINITE = [code for code in range(256) if code & 0x7F != 0x7F]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_keeps_the_contract(codec):
    check_codec(codec, tolerance=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-100, 100.0])
def test_every_code_decodes_to_its_value(dtype, scale):
    codes = torch.tensor(FINITE, dtype=torch.uint8).view(1, 1, -1)
    expected = (torch.tensor([e4m3(code) for code in FINITE], dtype=torch.float32) * torch.tensor(scale)).to(dtype)
    decoded = FP8Codec().decode({"": codes, "_scale": torch.full((1, 1), scale)}, (1, len(FINITE)), dtype)
    assert torch.equal(decoded[0], expected)


def test_rounds_to_the_nearest_and_ties_to_even():
    values = torch.tensor([e4m3(code) for code in FINITE if code < 0x80])
    middle = (values[1:] + values[:-1]) / 2
    weight = torch.cat(
        [torch.tensor([448.0]), values, middle, torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(999.0))]
    )
    codes = FP8Codec().encode(weight[None])[""].flatten()[1:]  # the first value makes the scale 1
    n = len(values)
    assert codes[:n].tolist() == list(range(n))
    assert codes[n : 2 * n - 1].tolist() == [low + low % 2 for low in range(n - 1)]
    assert codes[2 * n - 1 : 3 * n - 2].tolist() == list(range(n - 1))
    assert codes[3 * n - 2 :].tolist() == list(range(1, n))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_error_is_at_most_half_a_step(codec):
    weight = torch.randn(16, 200) * torch.logspace(-6, 1, 16)[:, None]
    buffers = codec.encode(weight)
    group = codec.group_size if isinstance(codec.group_size, int) else 200
    scale = buffers["_scale"].repeat_interleave(group, 1)[:, :200]
    step = torch.clamp(2.0 ** torch.floor(torch.log2((weight / scale).abs())), min=2.0**-6) / 8
    error = (codec.decode(buffers, (16, 200), torch.float32) - weight).abs()
    assert (error <= step / 2 * scale * (1 + 1e-5)).all()


def test_zeros_subnormals_non_contiguous_and_large_weights():
    weight = torch.zeros(64, 4096)
    weight[1] = 1e-38  # below the smallest normal number once divided by 448
    weight[2, ::7] = torch.randn(586)
    codec = FP8Codec()
    decoded = codec.decode(codec.encode(weight), (64, 4096), torch.float32)
    assert torch.equal(decoded[0], weight[0])
    assert (decoded[1] - weight[1]).abs().max() < 1e-38 * 0.07
    transposed = torch.randn(300, 50).T
    assert all(torch.equal(a, b) for a, b in zip(codec.encode(transposed).values(), codec.encode(transposed.contiguous()).values(), strict=True))
    big = torch.randn(BLOCK // 1000 + 3, 2000)  # several blocks, the last one cut off
    halves = [codec.encode(part) for part in big.split(len(big) // 2 + 1)]
    assert torch.equal(codec.encode(big)[""], torch.cat([half[""] for half in halves]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_what_cannot_be_represented_is_refused(bad):
    weight = torch.randn(4, 64)
    weight[2, 3] = bad
    with pytest.raises(CodecError, match="NaN, Inf or a value beyond"):
        FP8Codec().encode(weight)


@pytest.mark.parametrize("options", [{"bits": 6}, {"group_size": 8}, {"group_size": 1024}, {"group_size": "row"}])
def test_bad_configurations_are_refused(options):
    with pytest.raises(CodecError):
        FP8Codec(**options)
    with pytest.raises(CheckpointError, match="is not valid"):
        codec_from_dict({"type": "fp8", **options})


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_configuration_goes_to_a_checkpoint_and_back(codec):
    assert codec_from_dict(codec_to_dict(codec)) == codec


def test_bytes_are_half_of_bf16_and_a_little():
    assert FP8Codec().nbytes((1536, 576)) == 1536 * 576 + 1536 * 4
    assert FP8Codec(group_size=64).nbytes((1536, 576)) == 1536 * 576 + 1536 * 9 * 4


MODULES = {"model.layers.0.mlp.up_proj": LinearSpec(8, 4), "model.layers.0.mlp.gate": LinearSpec(8, 4), "lm_head": LinearSpec(8, 4, tied=True)}


def claimed(**options):
    return [claim.module for claim in FP8(FP8Config(**options)).claim(model_config=None, modules=MODULES)]


def test_claims_every_linear_but_heads_and_routers():
    assert claimed() == ["model.layers.0.mlp.up_proj"]
    assert claimed(include=["**.gate"], exclude=[]) == ["model.layers.0.mlp.gate"]


def test_claims_that_cannot_be_met_are_one_line():
    with pytest.raises(ClaimError, match="shared with the embedding.*add it to 'exclude'"):
        claimed(exclude=[])
    with pytest.raises(ClaimError, match="include 'model.layer.0' matches no linear module"):
        claimed(include=["model.layer.0"])
