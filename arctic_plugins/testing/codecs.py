"""The laws of codecs, whatever their format."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Sequence
from dataclasses import FrozenInstanceError, fields
from typing import TYPE_CHECKING, ClassVar

import pytest

from arctic_plugins.errors import CodecError
from arctic_plugins.testing.suite import Suite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from arctic_plugins.frozen import Buffers, Codec

__all__ = ["CodecSuite", "check_codec"]

SHAPES = ((8, 64), (3, 100), (1, 32), (4, 6, 96))
EXPERTS = (5, 24, 96)
COUNTS = (2, 0, 3, 1, 0)
"""Rows of each expert; two more rows belong to none."""


class CodecSuite(Suite):
    """The laws of :class:`arctic_plugins.frozen.Codec`.

    Subclass it::

        class TestMyCodec(CodecSuite):
            codecs = [MyCodec(), MyCodec(bits=3)]
            tolerance = 0.1
    """

    over = {"codec": "codecs"}

    codecs: ClassVar[Sequence[Codec]]
    """Configured instances, registered by an installed plugin."""
    tolerance: ClassVar[float]
    """Relative error (Frobenius norm) allowed for normally distributed weights."""
    activation_tolerance: ClassVar[float] = 0.0
    """Relative error (Frobenius norm) that ``linear`` may add by rounding its input."""
    shapes: ClassVar[Sequence[tuple[int, ...]]] = SHAPES
    """Shapes ``[*lead, N, K]`` of the weights to try."""

    def test_layout_and_nbytes_are_those_of_the_buffers(self, codec: Codec) -> None:
        for shape in self.shapes:
            buffers = codec.encode(_weight(shape))
            found = {suffix: (tuple(buffer.shape), buffer.dtype) for suffix, buffer in buffers.items()}
            expected = {suffix: (spec.shape, spec.dtype) for suffix, spec in codec.layout(shape).items()}
            assert found == expected, f"encode({shape}) returns other buffers than layout() specifies"
            size = sum(buffer.nbytes for buffer in buffers.values())
            assert codec.nbytes(shape) == size, f"nbytes{shape} is {codec.nbytes(shape)}, but the buffers take {size}"

    def test_codes_do_not_have_the_shape_of_the_weight(self, codec: Codec) -> None:
        for shape in self.shapes:
            assert codec.layout(shape)[""].shape != shape, (
                f"codes of {shape} have the weight's own shape: a host without the plugin would read them as weights"
            )

    def test_encoding_is_deterministic(self, codec: Codec) -> None:
        for shape in self.shapes:
            first, second = codec.encode(_weight(shape)), codec.encode(_weight(shape))
            assert _equal(first, second), f"two calls of encode({shape}) return different bytes"

    def test_decoding_stays_within_the_tolerance(self, codec: Codec) -> None:
        for shape in self.shapes:
            weight = _weight(shape)
            error = _error(_decoded(codec, weight), weight)
            assert error <= self.tolerance, f"decode{shape} has relative error {error:.3g}; expected {self.tolerance:g}"

    def test_zeros_stay_zeros(self, codec: Codec) -> None:
        weight = _weight((4, 96))
        weight[1:3] = 0
        assert not _decoded(codec, weight)[1:3].any(), "rows of zeros are decoded as something else"

    def test_decoding_in_every_dtype_rounds_once(self, codec: Codec) -> None:
        import torch

        for shape in self.shapes:
            buffers = codec.encode(_weight(shape))
            exact = codec.decode(buffers, shape, torch.float32)
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                found = codec.decode(buffers, shape, dtype)
                assert (found.shape, found.dtype) == (shape, dtype), f"decode{shape} to {dtype} returns {found.dtype}"
                assert torch.equal(found, exact.to(dtype)), f"decode{shape} to {dtype} is not float32, rounded once"

    def test_decoding_into_out_fills_it(self, codec: Codec) -> None:
        import torch

        for shape in self.shapes:
            buffers = codec.encode(_weight(shape))
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                expected = codec.decode(buffers, shape, dtype)
                out = torch.full(shape, float("nan"), dtype=dtype)
                found = codec.decode(buffers, shape, dtype, out=out)
                assert found.data_ptr() == out.data_ptr(), f"decode{shape} to {dtype} returns something other than out"
                assert torch.equal(out, expected), f"decode{shape} to {dtype} into out differs from decode without it"
                codec.decode(buffers, shape, dtype).zero_()
                again = codec.decode(buffers, shape, dtype)
                assert torch.equal(again, out), f"what decode{shape} returns shares memory with something that it needs"

    def test_rows_are_decoded_by_themselves(self, codec: Codec) -> None:
        import torch

        for shape in self.shapes:
            buffers = codec.encode(_weight(shape))
            whole = codec.decode(buffers, shape, torch.float32)
            picks = [
                (slice(None),) * (len(shape) - 2) + (rows,) for rows in (slice(0, -(-shape[-2] // 2)), slice(-1, None))
            ]
            picks += [(slice(1, 3),)] if len(shape) > 2 else []
            for pick in picks:
                part = {suffix: buffer[pick] for suffix, buffer in buffers.items()}
                expected = whole[pick]
                layout = codec.layout(tuple(expected.shape))
                assert {suffix: spec.shape for suffix, spec in layout.items()} == {
                    suffix: tuple(buffer.shape) for suffix, buffer in part.items()
                }, f"row law: slices of the buffers of {shape} do not have the layout of {tuple(expected.shape)}"
                found = codec.decode(part, tuple(expected.shape), torch.float32)
                assert torch.equal(found, expected), f"row law: rows {pick} of {shape} cannot be decoded by themselves"

    def test_columns_are_split_at_k_border(self, codec: Codec) -> None:
        import torch

        border = codec.k_border
        assert border >= 1, f"k_border is {border}; expected a positive number"
        shape = (4, border * max(3, -(-64 // border)))
        buffers, layout = codec.encode(_weight(shape)), codec.layout(shape)
        if layout[""].k_dim is None:
            pytest.skip("codes cannot be split along K: TensorSpec.k_dim is None")
        whole = codec.decode(buffers, shape, torch.float32)
        for start, stop in ((0, border), (border, shape[1]), (border, 2 * border)):
            part = {}
            for suffix, buffer in buffers.items():
                dim = layout[suffix].k_dim
                if dim is None:
                    part[suffix] = buffer
                    continue
                ends = [at * buffer.shape[dim] / shape[1] for at in (start, stop)]
                assert all(end.is_integer() for end in ends), (
                    f"k_border is {border}, but buffer '{suffix}' of {shape} has no border there"
                )
                part[suffix] = buffer.narrow(dim, int(ends[0]), int(ends[1] - ends[0]))
            expected = {suffix: spec.shape for suffix, spec in codec.layout((4, stop - start)).items()}
            assert {suffix: tuple(buffer.shape) for suffix, buffer in part.items()} == expected, (
                f"slices along TensorSpec.k_dim do not have the layout of columns {start} to {stop} of {shape}"
            )
            found = codec.decode(part, (4, stop - start), torch.float32)
            assert torch.equal(found, whole[:, start:stop]), (
                f"columns {start} to {stop} of {shape}, on borders of {border}, cannot be decoded by themselves"
            )

    def test_weights_of_every_dtype_are_encoded_by_value(self, codec: Codec) -> None:
        import torch

        for shape in self.shapes:
            for dtype in (torch.bfloat16, torch.float16):
                weight = _weight(shape).to(dtype)
                assert _equal(codec.encode(weight), codec.encode(weight.float())), (
                    f"a weight {shape} in {dtype} is encoded differently from the same values in float32"
                )

    def test_strides_and_gradients_of_the_weight_do_not_matter(self, codec: Codec) -> None:
        import torch

        weight = _weight((96, 8)).T
        expected = codec.encode(weight.contiguous())
        assert _equal(codec.encode(weight), expected), "a weight that is not contiguous is encoded differently"
        found = codec.encode(torch.nn.Parameter(weight.contiguous()))
        assert _equal(found, expected), "a weight that requires gradients is encoded differently"
        assert not any(buffer.requires_grad for buffer in found.values()), "encode() returns buffers with gradients"
        assert torch.equal(weight, _weight((96, 8)).T), "encode() changes the weight"

    def test_nan_and_inf_are_refused(self, codec: Codec) -> None:
        import torch

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for bad in (float("nan"), float("inf"), -float("inf")):
                for at in (0, -1):
                    weight = _weight((3, 100)).to(dtype)
                    weight.view(-1)[at] = bad
                    try:
                        codec.encode(weight)
                    except CodecError:
                        continue
                    raise AssertionError(f"encode() accepts {bad} in {dtype}; expected CodecError")

    def test_encoding_keeps_no_reference_to_the_weight(self, codec: Codec) -> None:
        import torch
        from torch.multiprocessing.reductions import StorageWeakRef

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            weight = _weight((8, 64)).to(dtype)
            storage = StorageWeakRef(weight.untyped_storage())
            buffers = codec.encode(weight)
            del weight
            if not storage.expired():
                gc.collect()
            assert storage.expired(), f"the memory of a weight in {dtype} stays in use after encode()"
            assert buffers

    def test_products_are_those_of_the_decoded_weight(self, codec: Codec) -> None:
        shape = (24, 96)
        buffers = codec.encode(_weight(shape))
        weight = _decoded(codec, _weight(shape))
        for dtype, tolerance in _products():
            for rows in ((5,), (2, 3), (1,), (0,)):
                x = _weight((*rows, 96), seed=1).to(dtype)
                _compare("linear", codec.linear(x, buffers, shape), x, weight.T, tolerance + self.activation_tolerance)
                grad = _weight((*rows, 24), seed=2).to(dtype)
                _compare("grad_input", codec.grad_input(grad, buffers, shape), grad, weight, tolerance)

    def test_products_of_experts_are_those_of_the_decoded_weights(self, codec: Codec) -> None:
        import torch

        counts = torch.tensor(COUNTS)
        buffers = {suffix: buffer.clone() for suffix, buffer in codec.encode(_weight(EXPERTS)).items()}
        weight = _decoded(codec, _weight(EXPERTS))
        for idle in (expert for expert, count in enumerate(COUNTS) if not count):
            for buffer in buffers.values():
                buffer[idle].view(torch.uint8).fill_(0xFF)  # must not be read
        experts = [expert for expert, count in enumerate(COUNTS) for _ in range(count)]
        for dtype, tolerance in _products():
            for name, width, matrices, more in (
                ("linear_experts", 96, weight.mT, self.activation_tolerance),
                ("grad_input_experts", 24, weight, 0.0),
            ):
                rows = _weight((len(experts) + 2, width), seed=1).to(dtype)
                found = getattr(codec, name)(rows, buffers, EXPERTS, counts)
                assert found.shape == (len(rows), matrices.shape[-1]), f"{name}() returns {tuple(found.shape)}"
                assert not found[len(experts) :].any(), f"{name}() returns other than zeros for rows of no expert"
                expected = torch.stack([row.float() @ matrices[at] for row, at in zip(rows, experts, strict=False)])
                _close(name, found[: len(experts)], expected, dtype, tolerance + more)
                none = getattr(codec, name)(rows[:2], buffers, EXPERTS, torch.zeros_like(counts))
                assert none.shape == (2, matrices.shape[-1]), f"{name}() fails if no row belongs to an expert"
                assert not none.any(), f"{name}() returns other than zeros for rows of no expert"

    def test_gradients_flow_through_a_layer(self, codec: Codec) -> None:
        from arctic_plugins.frozen import FrozenLinear

        layer = FrozenLinear(96, 24, bias=False, codec=codec)
        layer.encode(_weight((24, 96)))
        x, grad = _weight((5, 96), seed=1).requires_grad_(), _weight((5, 24), seed=2)
        layer(x).backward(grad)
        assert x.grad is not None, "a layer passes no gradient to its input"
        _close("the gradient of a layer", x.grad, grad @ layer.decode(), x.dtype, 1e-4)
        assert all(parameter.grad is None for parameter in layer.parameters()), "encoded bytes get a gradient"

    def test_configuration_is_immutable_and_hashable(self, codec: Codec) -> None:
        same = type(codec)(**{field.name: getattr(codec, field.name) for field in fields(codec)})
        assert (same, hash(same)) == (codec, hash(codec)), "codecs of equal configuration must be equal"
        for name in [field.name for field in fields(codec)] or ["anything"]:
            try:
                setattr(same, name, None)
            except FrozenInstanceError:
                continue
            raise AssertionError(f"{type(codec).__name__}.{name} can be changed; expected @dataclass(frozen=True)")

    def test_configuration_goes_to_a_checkpoint_and_back(self, codec: Codec) -> None:
        from arctic_plugins.frozen import codec_from_dict, codec_to_dict

        stored = json.loads(json.dumps(codec_to_dict(codec)))
        again = codec_from_dict(stored)
        assert type(again) is type(codec), f"type '{codec.type}' is registered for {type(again).__name__}"
        assert again == codec, f"config.json holds {stored}, which is read as {again}; expected {codec}"
        assert hash(again) == hash(codec), f"{again} is read from config.json with another hash"

    def test_description_is_one_line(self, codec: Codec) -> None:
        assert codec.describe(), "describe() returns an empty string"
        assert "\n" not in codec.describe(), "describe() returns several lines"


def check_codec(codec: Codec, *, tolerance: float, shapes: Iterable[tuple[int, ...]] = SHAPES) -> None:
    """Run the laws of :class:`CodecSuite` for one codec, in one test.

    Args:
        codec: a configured instance, registered by an installed plugin.
        tolerance: relative error (Frobenius norm) allowed for normally distributed weights.
        shapes: shapes ``[*lead, N, K]`` of the weights to try; the default includes odd sizes and experts.

    Raises:
        AssertionError: a law is broken; the message names it.
    """
    attributes = {"codecs": (codec,), "tolerance": tolerance, "shapes": tuple(shapes)}
    type("Checked", (CodecSuite,), attributes)().check(codec=codec)


def _weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _decoded(codec: Codec, weight: Tensor) -> Tensor:
    import torch

    return codec.decode(codec.encode(weight), tuple(weight.shape), torch.float32)


def _equal(one: Buffers, other: Buffers) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(buffer, other[suffix]) for suffix, buffer in one.items())


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def _products() -> list[tuple[torch.dtype, float]]:
    """Return the dtypes of products, each with the relative error that rounding weights and results to it may cause."""
    import torch

    return [(torch.float32, 1e-4), (torch.bfloat16, 0.02), (torch.float16, 0.005)]


def _compare(name: str, found: Tensor, rows: Tensor, matrix: Tensor, tolerance: float) -> None:
    _close(name, found, rows.float() @ matrix, rows.dtype, tolerance)


def _close(name: str, found: Tensor, expected: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    assert found.dtype == dtype, f"{name} of rows in {dtype} returns {found.dtype}; expected the dtype of the rows"
    assert found.shape == expected.shape, f"{name} returns {tuple(found.shape)}; expected {tuple(expected.shape)}"
    error = _error(found.float(), expected)
    assert error <= tolerance, (
        f"{name} in {dtype} has relative error {error:.3g} to the decoded weight; expected {tolerance:g}"
    )
