"""Checks that every codec must pass, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arctic_plugins.frozen import Codec

__all__ = ["check_codec"]

SHAPES = ((8, 64), (3, 100), (1, 32), (4, 6, 96))


def check_codec(codec: Codec, *, tolerance: float, shapes: Iterable[tuple[int, ...]] = SHAPES) -> None:
    """Check that ``codec`` obeys the protocol of :class:`arctic_plugins.frozen.Codec`.

    Args:
        codec: a configured instance.
        tolerance: relative error (Frobenius norm) allowed for normally distributed weights.
        shapes: shapes ``[*lead, N, K]`` of the weights to try; the default includes odd sizes and experts.

    Raises:
        AssertionError: if a law is broken; the message names the law and the shape.
    """
    import pytest
    import torch

    from arctic_plugins.errors import CodecError

    assert hash(codec) == hash(type(codec)(**vars(codec))), "codecs of equal configuration must be equal"
    for shape in shapes:
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        buffers, layout = codec.encode(weight), codec.layout(shape)
        found = {suffix: (tuple(buffer.shape), buffer.dtype) for suffix, buffer in buffers.items()}
        assert found == {suffix: (spec.shape, spec.dtype) for suffix, spec in layout.items()}, (
            f"layout{shape} does not match what encode returns"
        )
        assert sum(buffer.nbytes for buffer in buffers.values()) == codec.nbytes(shape)
        assert tuple(layout[""].shape) != shape, (
            f"codes of {shape} have the weight's own shape: a host without the plugin would read them as weights"
        )
        again = codec.encode(weight)
        assert all(torch.equal(buffer, again[suffix]) for suffix, buffer in buffers.items()), (
            f"encode of {shape} is not deterministic"
        )

        decoded = codec.decode(buffers, shape, torch.float32)
        assert decoded.shape == shape
        assert ((decoded - weight).norm() / weight.norm()).item() <= tolerance, (
            f"decode of {shape} differs from the weight by more than {tolerance}"
        )
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.full(shape, float("nan"), dtype=dtype)
            assert codec.decode(buffers, shape, dtype, out=out) is out
            assert torch.equal(out, codec.decode(buffers, shape, dtype)), (
                f"decode of {shape} into out differs in {dtype}"
            )
            assert torch.equal(out, decoded.to(dtype)), f"decode of {shape} to {dtype} is not float32, rounded once"

        rows = slice(0, -(-shape[-2] // 2))
        part = {
            suffix: buffer[..., rows, :, :] if buffer.dim() == len(shape) + 1 else buffer[..., rows, :]
            for suffix, buffer in buffers.items()
        }
        part_shape = (*shape[:-2], rows.stop, shape[-1])
        assert torch.equal(codec.decode(part, part_shape, torch.float32), decoded[..., rows, :]), (
            f"row law: rows of {shape} cannot be decoded separately"
        )

        broken = weight.clone()
        broken.view(-1)[0] = float("nan")
        with pytest.raises(CodecError):
            codec.encode(broken)
    x_MK = torch.randn(5, 64)
    weight = torch.randn(8, 64)
    buffers = codec.encode(weight)
    expected = x_MK @ codec.decode(buffers, (8, 64), torch.float32).T
    torch.testing.assert_close(codec.linear(x_MK, buffers, (8, 64)), expected, rtol=1e-4, atol=1e-4)
