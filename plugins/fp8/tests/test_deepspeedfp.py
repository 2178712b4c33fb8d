"""DeepSpeedFP against its definition, written here from DeepSpeed's kernels in Python's own arithmetic."""

import random
import struct

import pytest
import torch
from arctic_plugins_fp8.codec import FP8Codec
from arctic_plugins_fp8.deepspeedfp import DeepSpeedFPConverter, DeepSpeedFPExporter

from arctic_plugins.errors import CheckpointError, CodecError

EXPONENT = {8: 4, 6: 3, 12: 7}


def number(code, bits):
    """What DeepSpeed's dequantization makes of a code, before the scale: every exponent is a normal one."""
    exponent_bits = EXPONENT[bits]
    mantissa_bits = bits - 1 - exponent_bits
    exponent, mantissa = code >> mantissa_bits & 2**exponent_bits - 1, code & 2**mantissa_bits - 1
    magnitude = 2.0 ** (exponent - 2 ** (exponent_bits - 1) + 1) * (1 + mantissa / 2**mantissa_bits)
    return -magnitude if code >> (bits - 1) else magnitude


def stored(codes, scales, bits, group):
    """Bytes of groups of codes, each followed by its scale."""
    rows = []
    for at, scale in enumerate(scales):
        whole = sum(code << (bits * place) for place, code in enumerate(codes[at * group : (at + 1) * group]))
        rows.append(list(whole.to_bytes(group * bits // 8, "little") + struct.pack("<f", scale)))
    return torch.tensor(rows, dtype=torch.uint8)


def converter(bits, group=512):
    return DeepSpeedFPConverter({"quant_method": "deepspeedfp", "bits": bits, "group_size": group})


def writable(bits):
    """Codes that DeepSpeed writes: exponents from 1; of 12 bits, those that ours can hold."""
    numbers = {code: abs(number(code, bits)) for code in range(2**bits)}
    smallest = 2.0**-9 if bits == 12 else 2.0 ** (2 - 2 ** (EXPONENT[bits] - 1))
    return [code for code, magnitude in numbers.items() if smallest <= magnitude <= 510]


@pytest.mark.parametrize("bits", [8, 6, 12])
@pytest.mark.parametrize("shape", [(4, 512), (3, 1024), (16, 96), (8, 320), (2, 4, 768)])
def test_what_deepspeed_writes_is_read_exactly(bits, shape):
    drawn = random.Random(0)
    count = torch.Size(shape).numel()
    codes = drawn.choices(writable(bits), k=count)
    scales = [drawn.uniform(1e-4, 1e-2) for _ in range(count // 512)]
    expected = torch.tensor([number(code, bits) for code in codes]) * torch.tensor(scales).repeat_interleave(512)
    found = converter(bits)
    codec, buffers = found.codec(shape), found.buffers(stored(codes, scales, bits, 512), shape)
    assert {suffix: spec.shape for suffix, spec in codec.layout(shape).items()} == {
        suffix: tuple(buffer.shape) for suffix, buffer in buffers.items()
    }
    assert torch.equal(codec.decode(buffers, shape, torch.float32), expected.view(shape))


@pytest.mark.parametrize("bits", [8, 6, 12])
def test_every_code_is_read_to_the_nearest(bits):
    codes = [code for code in range(2**bits) if abs(number(code, bits)) <= 510] * 512
    codes = codes[: len(codes) // 512 * 512]
    shape = (len(codes) // 512, 512)
    found = converter(bits)
    decoded = (
        found.codec(shape)
        .decode(found.buffers(stored(codes, [1.0] * shape[0], bits, 512), shape), shape, torch.float32)
        .flatten()
    )
    exact = torch.tensor([number(code, bits) for code in codes])
    step = {8: 2.0**-9, 6: 2.0**-4, 12: 2.0**-13}[bits]
    assert (decoded - exact).abs().max() <= step / 2


@pytest.mark.parametrize("bits", [8, 6])
def test_there_and_back_is_exact_but_for_the_smallest(bits):
    codec, shape = FP8Codec(bits=bits, group_size=512), (6, 1024)
    buffers = codec.encode(torch.randn(shape))
    exported = DeepSpeedFPExporter().tensors(codec, buffers, shape)["weight"]
    assert exported.shape == (12, 512 * bits // 8 + 4)
    again = converter(bits).buffers(exported, shape)
    weight, found = codec.decode(buffers, shape, torch.float32), codec.decode(again, shape, torch.float32)
    smallest = 2.0 ** -(2 ** (EXPONENT[bits] - 1) - 1) * buffers["_scale"].repeat_interleave(512, 1)
    assert torch.equal(found[weight.abs() >= smallest], weight[weight.abs() >= smallest])
    assert ((found - weight).abs() <= smallest).all()
    assert torch.equal(again["_scale"], buffers["_scale"])


@pytest.mark.parametrize(
    "config", [{}, {"bits": 4}, {"bits": [8]}, {"bits": 8, "group_size": "512"}, {"bits": 8, "group_size": 0}]
)
def test_configs_that_say_too_little(config):
    with pytest.raises(CheckpointError, match="quantized with bits .* expected bits of 8, 6 or 12 in groups"):
        DeepSpeedFPConverter(config)


def test_what_cannot_be_read_is_told():
    assert DeepSpeedFPConverter({"bits": 6, "group_size": 256}).codec((4, 256)) == FP8Codec(bits=6, group_size=256)
    assert DeepSpeedFPConverter({"bits": 8}).rows(torch.zeros(12, 516), 1024) == 6
    with pytest.raises(CodecError, match="weight of shape .512, 33. in groups of 512 cannot be split"):
        converter(8).codec((512, 33))
    with pytest.raises(CodecError, match=r"has \(4, 512\) bytes; expected \(4, 516\)"):
        converter(8).buffers(torch.zeros(4, 512, dtype=torch.uint8), (4, 512))
    with pytest.raises(CodecError, match="scale is NaN or infinite"):
        converter(8).buffers(stored([1] * 512, [float("nan")], 8, 512), (1, 512))


@pytest.mark.parametrize("codec", [FP8Codec(), FP8Codec(bits=12, group_size=512)])
def test_what_cannot_be_exported_is_told(codec):
    with pytest.raises(CodecError, match="up_proj is encoded as .* expected fp8 with bits 8 or 6 and group_size 512"):
        DeepSpeedFPExporter().quantization_config({"up_proj": codec}, [])
    with pytest.raises(CodecError, match="has 96 inputs; expected a multiple of 512"):
        DeepSpeedFPExporter().tensors(FP8Codec(group_size=512), {}, (4, 96))
