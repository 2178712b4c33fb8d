"""Each law of codecs finds the codecs that break it, and only those."""

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import pytest
import torch

from arctic_plugins.errors import CodecError
from arctic_plugins.frozen import Codec, TensorSpec
from arctic_plugins.registry import Registry
from arctic_plugins.testing import CodecSuite, check_codec

KEPT, LENT, KINDS, CALLS = [], {}, {}, count()


@dataclass(frozen=True)
class Sound(Codec):
    """Symmetric integers with a scale per group, one byte each."""

    type: ClassVar[str] = "sound"

    bits: int = 8
    group: int = 32

    def __init_subclass__(cls):
        cls.type = cls.__name__
        KINDS[cls.type] = cls

    @property
    def k_border(self):
        return self.group

    def layout(self, shape):
        *rows, k = shape
        groups = -(-k // self.group)
        return {
            "": TensorSpec((*rows, groups, self.group), torch.int8, k_dim=len(rows)),
            "_scale": TensorSpec((*rows, groups), torch.float32, k_dim=len(rows)),
        }

    def grouped(self, weight):
        missing = -weight.shape[-1] % self.group
        return torch.nn.functional.pad(weight.detach().float(), (0, missing)).unflatten(-1, (-1, self.group))

    def encode(self, weight):
        groups = self.grouped(weight)
        largest = groups.abs().amax(-1)
        if not largest.isfinite().all():
            raise CodecError("NaN or Inf in the weight")
        scale = torch.where(largest == 0, 1.0, largest / (2 ** (self.bits - 1) - 1))
        return {"": (groups / scale.unsqueeze(-1)).round().to(torch.int8), "_scale": scale}

    def decode(self, buffers, shape, dtype, *, out=None):
        weight = (buffers[""].float() * buffers["_scale"].unsqueeze(-1)).flatten(-2)[..., : shape[-1]].to(dtype)
        return weight if out is None else out.copy_(weight)


KINDS["sound"] = Sound


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The codecs of this file, as if an installed plugin had registered them."""
    monkeypatch.setattr(Registry, "load_codec", lambda self, name: KINDS[name])
    yield
    KEPT.clear()
    LENT.clear()


class TestSound(CodecSuite):
    codecs = [Sound(), Sound(bits=4, group=8)]
    tolerance = 0.15


class WrongGradient(Sound):
    def grad_input(self, grad, buffers, shape):
        return 2 * super().grad_input(grad, buffers, shape)


class GradientOfExpertsOnly(Sound):
    def grad_input_experts(self, grad, buffers, shape, counts):
        return super().grad_input_experts(grad, buffers, shape, counts.flip(0))


class ZerosOfExperts(Sound):
    def linear_experts(self, x, buffers, shape, counts):
        return x.new_zeros(len(x), shape[1])


class RowsOfNoExpert(Sound):
    def linear_experts(self, x, buffers, shape, counts):
        result = super().linear_experts(x, buffers, shape, counts)
        result[int(counts.sum()) :] = 1
        return result


class ReadsIdleExperts(Sound):
    def linear_experts(self, x, buffers, shape, counts):
        weight = self.decode(buffers, shape, torch.float32)
        experts = torch.arange(len(counts)).repeat_interleave(counts)
        y = x.new_zeros(len(x), shape[1])
        y[: len(experts)] = torch.einsum(
            "mk,enk,me->mn", x[: len(experts)].float(), weight, _one_hot(experts, counts)
        ).to(x.dtype)
        return y


def _one_hot(experts, counts):
    return torch.nn.functional.one_hot(experts, len(counts)).float()


class WrongBorder(Sound):
    k_border = 8


class BorderWithoutLayout(Sound):
    def layout(self, shape):
        layout = super().layout(shape)
        return {**layout, "_scale": TensorSpec(layout["_scale"].shape, torch.float32)}


class Widening(Sound):
    def linear(self, x, buffers, shape):
        return super().linear(x, buffers, shape).float()


class KeepsWeights(Sound):
    def encode(self, weight):
        KEPT.append(weight.detach())
        return super().encode(weight)


class TakesInf(Sound):
    def encode(self, weight):
        if weight.isnan().any():
            raise CodecError("NaN in the weight")
        return super().encode(weight.nan_to_num(posinf=1.0, neginf=1.0))


class TakesNanInHalves(Sound):
    def encode(self, weight):
        return super().encode(weight if weight.dtype == torch.float32 else weight.nan_to_num())


class ScalesHalves(Sound):
    def encode(self, weight):
        buffers = super().encode(weight)
        factor = 1.01 if weight.dtype == torch.bfloat16 else 1.0
        return {**buffers, "_scale": buffers["_scale"] * factor}


class Varying(Sound):
    def encode(self, weight):
        buffers = super().encode(weight)
        if weight.shape == (1, 32):  # of no other law
            buffers[""][0, 0, 0] += next(CALLS) % 3
        return buffers


class SeesOtherRows(Sound):
    """It stores scales in reverse order."""

    def encode(self, weight):
        buffers = super().encode(weight)
        return {**buffers, "_scale": buffers["_scale"].flip(-2)}

    def decode(self, buffers, shape, dtype, *, out=None):
        return super().decode({**buffers, "_scale": buffers["_scale"].flip(-2)}, shape, dtype, out=out)


class WrongBytes(Sound):
    def nbytes(self, shape):
        return super().nbytes(shape) + 1


class WrongLayout(Sound):
    def layout(self, shape):
        layout = super().layout(shape)
        return {**layout, "_scale": TensorSpec(layout["_scale"].shape, torch.int32, k_dim=len(shape) - 1)}


class IgnoresOut(Sound):
    def decode(self, buffers, shape, dtype, *, out=None):
        return super().decode(buffers, shape, dtype)


class FillsOutOtherwise(Sound):
    def decode(self, buffers, shape, dtype, *, out=None):
        weight = super().decode(buffers, shape, dtype)
        return weight if out is None else out.copy_(weight + (shape == (8, 64)))


class LendsItsMemory(Sound):
    def decode(self, buffers, shape, dtype, *, out=None):
        if out is not None or dtype != torch.float16:
            return super().decode(buffers, shape, dtype, out=out)
        return LENT.setdefault(shape, super().decode(buffers, shape, dtype))


class RoundsTwice(Sound):
    def decode(self, buffers, shape, dtype, *, out=None):
        if dtype != torch.float64:
            return super().decode(buffers, shape, dtype, out=out)
        return super().decode(buffers, shape, torch.bfloat16).double()


class AlwaysFloat(Sound):
    def decode(self, buffers, shape, dtype, *, out=None):
        return super().decode(buffers, shape, torch.float32 if dtype == torch.float64 else dtype, out=out)


class Inaccurate(Sound):
    def decode(self, buffers, shape, dtype, *, out=None):
        return super().decode({**buffers, "_scale": buffers["_scale"] * 1.2}, shape, dtype, out=out)


class ZerosAreSmall(Sound):
    def encode(self, weight):
        buffers = super().encode(weight)
        buffers[""][(self.grouped(weight) == 0).all(-1)] = 1
        return buffers


class InOrderOfMemory(Sound):
    def encode(self, weight):
        whole = torch.as_strided(weight.detach(), (weight.numel(),), (1,)) if weight.dim() == 2 else weight
        return super().encode(whole.view(weight.shape))


class ChangesWeights(Sound):
    def encode(self, weight):
        buffers = super().encode(weight)
        if not weight.is_contiguous():
            weight.detach().add_(1)
        return buffers


class OwnShape(Sound):
    """It stores codes in the shape of the weight."""

    def layout(self, shape):
        layout = super().layout(shape)
        return {**layout, "": TensorSpec(shape, torch.int8, k_dim=len(shape) - 1)}

    def encode(self, weight):
        buffers = super().encode(weight)
        return {**buffers, "": buffers[""].flatten(-2)[..., : weight.shape[-1]].contiguous()}

    def decode(self, buffers, shape, dtype, *, out=None):
        return super().decode({**buffers, "": self.grouped(buffers[""]).to(torch.int8)}, shape, dtype, out=out)


class Mutable(Sound):
    __setattr__ = object.__setattr__


class ByIdentity(Sound):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class NotJson(Sound):
    groups: tuple = (1, 2)


class Talkative(Sound):
    def describe(self):
        return "two\nlines"


LAYOUT, SHAPE, SAME, BOUND, ZEROS, DTYPES, OUT, ROWS, COLUMNS, VALUE, STRIDES, NAN, REFERENCE, PRODUCTS = (
    "layout_and_nbytes_are_those_of_the_buffers",
    "codes_do_not_have_the_shape_of_the_weight",
    "encoding_is_deterministic",
    "decoding_stays_within_the_tolerance",
    "zeros_stay_zeros",
    "decoding_in_every_dtype_rounds_once",
    "decoding_into_out_fills_it",
    "rows_are_decoded_by_themselves",
    "columns_are_split_at_k_border",
    "weights_of_every_dtype_are_encoded_by_value",
    "strides_and_gradients_of_the_weight_do_not_matter",
    "nan_and_inf_are_refused",
    "encoding_keeps_no_reference_to_the_weight",
    "products_are_those_of_the_decoded_weight",
)
EXPERTS, LAYER, FROZEN, STORED, DESCRIBED = (
    "products_of_experts_are_those_of_the_decoded_weights",
    "gradients_flow_through_a_layer",
    "configuration_is_immutable_and_hashable",
    "configuration_goes_to_a_checkpoint_and_back",
    "description_is_one_line",
)
MUTANTS = {
    WrongGradient: {PRODUCTS, EXPERTS, LAYER},  # both follow from it
    GradientOfExpertsOnly: {EXPERTS},
    ZerosOfExperts: {EXPERTS},
    RowsOfNoExpert: {EXPERTS},
    ReadsIdleExperts: {EXPERTS},
    WrongBorder: {COLUMNS},
    BorderWithoutLayout: {COLUMNS},
    Widening: {PRODUCTS},
    KeepsWeights: {REFERENCE},
    TakesInf: {NAN},
    TakesNanInHalves: {NAN},
    ScalesHalves: {VALUE},
    Varying: {SAME, VALUE},  # both encode twice
    SeesOtherRows: {ROWS},
    WrongBytes: {LAYOUT},
    WrongLayout: {LAYOUT, LAYER},  # which also checks what it is given
    IgnoresOut: {OUT},
    FillsOutOtherwise: {OUT},
    LendsItsMemory: {OUT},
    RoundsTwice: {DTYPES},
    AlwaysFloat: {DTYPES},
    Inaccurate: {BOUND},
    ZerosAreSmall: {ZEROS},
    InOrderOfMemory: {STRIDES},
    ChangesWeights: {STRIDES},
    OwnShape: {SHAPE},
    Mutable: {FROZEN},
    ByIdentity: {FROZEN, STORED},
    NotJson: {STORED},
    Talkative: {DESCRIBED},
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_broken_codec_breaks_its_law_and_no_other(broken_laws, mutant):
    assert broken_laws(TestSound(), codec=mutant()) == MUTANTS[mutant]
    with pytest.raises((AssertionError, TypeError)):
        check_codec(mutant(), tolerance=0.15)


def test_every_law_has_a_mutant():
    assert {f"test_{law}" for laws in MUTANTS.values() for law in laws} == CodecSuite.laws().keys()
