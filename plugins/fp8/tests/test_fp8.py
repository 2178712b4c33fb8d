"""The formats against their definitions, on every code and on awkward weights, and the plugin's claims."""

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.config import FP8Config
from arctic_plugins_fp8.plugin import FP8

from arctic_plugins.claims import LinearSpec
from arctic_plugins.errors import CheckpointError, ClaimError, CodecError
from arctic_plugins.frozen import codec_from_dict

CODECS = [
    *(FP8Codec(group_size=group) for group in ("channel", 32, 100, 128)),
    *(FP8Codec(bits=6, group_size=group) for group in ("channel", 32, 100, 128)),
    FP8Codec(bits=6, group_size=32, scale="mse"),
    FP8Codec(scale="mse"),
    *(FP8Codec(bits=12, group_size=group) for group in ("channel", 32, 46, 512)),
]
FORMATS = {
    8: (4, 3, 448.0),
    6: (3, 2, 28.0),
    12: (4, 7, 510.0),
}  # bits of exponent and mantissa, largest value that is written


def value(code, bits):
    """The value of a code by the definition of a small float, in Python's arithmetic."""
    exponent_bits, mantissa_bits, _ = FORMATS[bits]
    bias, steps = 2 ** (exponent_bits - 1) - 1, 2**mantissa_bits
    exponent, mantissa = code // steps % 2**exponent_bits, code % steps
    magnitude = (
        2.0 ** (exponent - bias) * (1 + mantissa / steps) if exponent else 2.0 ** (1 - bias) * (mantissa / steps)
    )
    return -magnitude if code >= 2 ** (bits - 1) else magnitude


def pack(codes, bits):
    """Codes to bytes, least significant bits first, in Python's integers."""
    whole = sum(code << (bits * at) for at, code in enumerate(codes))
    return list(whole.to_bytes(len(codes) * bits // 8, "little"))


def unpack(data, bits):
    whole = int.from_bytes(bytes(data), "little")
    return [whole >> (bits * at) & (2**bits - 1) for at in range(len(data) * 8 // bits)]


@pytest.mark.parametrize("bits", [8, 6, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-100, 100.0])
def test_every_code_decodes_to_its_value(bits, dtype, scale):
    codes = list(range(2**bits))
    expected = (torch.tensor([value(code, bits) for code in codes], dtype=torch.float32) * torch.tensor(scale)).to(
        dtype
    )
    packed = torch.tensor(pack(codes, bits), dtype=torch.uint8).view(1, 1, -1)
    decoded = FP8Codec(bits=bits).decode({"": packed, "_scale": torch.full((1, 1), scale)}, (1, len(codes)), dtype)
    assert torch.equal(decoded[0], expected)


@pytest.mark.parametrize("bits", [8, 6, 12])
def test_rounds_to_the_nearest_and_ties_to_even(bits):
    top = FORMATS[bits][2]
    values = torch.tensor([number for code in range(2 ** (bits - 1)) if (number := value(code, bits)) <= top])
    middle = (values[1:] + values[:-1]) / 2
    weight = torch.cat(
        [
            torch.tensor([top]),
            values,
            middle,
            torch.nextafter(middle, torch.tensor(0.0)),
            torch.nextafter(middle, torch.tensor(999.0)),
        ]
    )
    weight = torch.cat([weight, -weight, torch.zeros(-2 * len(weight) % 4)])
    codes = unpack(
        FP8Codec(bits=bits).encode(weight[None])[""].flatten().tolist(), bits
    )  # the first value makes the scale 1
    n, half = len(values), 4 * len(values) - 2
    for sign, found in ((0, codes[1:half]), (2 ** (bits - 1), codes[half + 1 : 2 * half])):
        found = [code - sign for code in found]
        assert found[:n] == list(range(n))
        assert found[n : 2 * n - 1] == [low + low % 2 for low in range(n - 1)]
        assert found[2 * n - 1 : 3 * n - 2] == list(range(n - 1))
        assert found[3 * n - 2 :] == list(range(1, n))


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_error_is_at_most_half_a_step(codec):
    weight = torch.randn(16, 200) * torch.logspace(-6, 1, 16)[:, None]
    buffers = codec.encode(weight)
    group = codec.group_size if isinstance(codec.group_size, int) else 200
    exponent_bits, mantissa_bits, _ = FORMATS[codec.bits]
    scale = buffers["_scale"].repeat_interleave(group, 1)[:, :200]
    step = (
        torch.clamp(2.0 ** torch.floor(torch.log2((weight / scale).abs())), min=2.0 ** (2 - 2 ** (exponent_bits - 1)))
        / 2**mantissa_bits
    )
    error = (codec.decode(buffers, (16, 200), torch.float32) - weight).abs()
    assert (error <= step / 2 * scale * (1 + 1e-5)).all()


def test_subnormals_and_large_weights():
    weight = torch.zeros(64, 4096)
    weight[1] = 1e-38  # below the smallest normal number once divided by 448
    weight[2, ::7] = torch.randn(586)
    codec = FP8Codec()
    decoded = codec.decode(codec.encode(weight), (64, 4096), torch.float32)
    assert torch.equal(decoded[0], weight[0])
    assert (decoded[1] - weight[1]).abs().max() < 1e-38 * 0.07
    big = torch.randn(600, 2000)  # more than the kernels take at a time, the last part cut off
    halves = [codec.encode(part) for part in big.split(len(big) // 2 + 1)]
    assert torch.equal(codec.encode(big)[""], torch.cat([half[""] for half in halves]))


def test_what_cannot_be_represented_is_refused():
    weight = torch.randn(4, 64)
    weight[2, 3] = 1e6
    with pytest.raises(CodecError, match="NaN, Inf or a value outside"):
        FP8Codec().encode(weight)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 6, "group_size": 50},
        {"bits": 12, "group_size": 33},
        {"group_size": 8},
        {"group_size": 1024},
        {"group_size": "row"},
        {"scale": "min"},
        {"activations": "int8"},
        {"activations": "fp8", "bits": 12},
        {"activations": "fp8", "group_size": 128},
    ],
)
def test_bad_configurations_are_refused(options):
    with pytest.raises(CodecError):
        FP8Codec(**options)
    with pytest.raises(CheckpointError, match="is not valid"):
        codec_from_dict({"type": "fp8", **options})


def test_bytes_are_half_of_bf16_and_a_little():
    assert FP8Codec().nbytes((1536, 576)) == 1536 * 576 + 1536 * 4
    assert FP8Codec(group_size=64).nbytes((1536, 576)) == 1536 * 576 + 1536 * 9 * 4
    assert FP8Codec(bits=6, group_size=64).nbytes((1536, 576)) == 1536 * 576 * 6 // 8 + 1536 * 9 * 4
    assert FP8Codec(bits=12).nbytes((1536, 576)) == 1536 * 576 * 12 // 8 + 1536 * 4


MODULES = {
    "model.layers.0.mlp.up_proj": LinearSpec(8, 4),
    "model.layers.0.mlp.gate": LinearSpec(8, 4),
    "lm_head": LinearSpec(8, 4, tied=True),
}


def claimed(**options):
    return [claim.module for claim in FP8(FP8Config(**options)).claim(model_config=None, modules=MODULES)]


def test_claims_every_linear_but_heads_and_routers():
    assert claimed() == ["model.layers.0.mlp.up_proj"]
    assert claimed(include=["**.gate"], exclude=[]) == ["model.layers.0.mlp.gate"]


def test_formats_by_pattern():
    modules = {
        f"model.layers.{layer}.{part}_proj": LinearSpec(8, 4)
        for layer in range(2)
        for part in ("mlp.up", "mlp.down", "self_attn.o")
    }
    options = {
        "bits": 12,
        "formats": {
            "**.mlp.*": {"bits": 6},
            "**.0.**.down_proj": {"bits": 6, "group_size": 128},
            "**.1.self_attn.*": {"group_size": 64},
        },
    }
    claims = {
        claim.module: claim.value for claim in FP8(FP8Config(**options)).claim(model_config=None, modules=modules)
    }
    assert claims == {
        **{
            f"model.layers.{layer}.mlp.{part}_proj": FP8Codec(bits=6, group_size=128, scale="mse")
            for layer in range(2)
            for part in ("up", "down")
        },
        "model.layers.0.self_attn.o_proj": FP8Codec(bits=12),
        "model.layers.1.self_attn.o_proj": FP8Codec(group_size=64),
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"formats": {"**.mpl.*": {"bits": 6}}},
            ClaimError,
            "formats '\\*\\*.mpl.\\*' matches no module that is encoded",
        ),
        ({"formats": {"lm_head": {"bits": 12}}}, ClaimError, "matches no module that is encoded"),
        (
            {"formats": {"**.mlp.*": {"bits": 6}, "**.up_proj": {"bits": 12}}},
            ClaimError,
            "both match model.layers.0.mlp.up_proj",
        ),
        ({"formats": {"**": {"bit": 6}}}, ValueError, "Extra inputs are not permitted"),
        ({"bits": 6, "group_size": 50}, ValueError, "expected a multiple of 4"),
        ({"bits": 12, "activations": "fp8"}, ValueError, "activations 'fp8' requires bits 8"),
    ],
)
def test_bad_formats_are_told(options, error, message):
    with pytest.raises(error, match=message):
        claimed(**options)


def test_claims_that_cannot_be_met_are_one_line():
    with pytest.raises(ClaimError, match="tied to the embedding.*add it to 'exclude'"):
        claimed(exclude=[])
    with pytest.raises(ClaimError, match="include 'model.layer.0' matches no linear module"):
        claimed(include=["model.layer.0"])
