"""The laws of RoPE types."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from arctic_plugins.discovery import process_registry
from arctic_plugins.testing.suite import Suite

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RopeTypeSuite"]


class RopeTypeSuite(Suite):
    """The laws of functions registered with :meth:`arctic_plugins.Registry.rope_type`.

    Subclass it::

        class TestMyType(RopeTypeSuite):
            rope_type = "my-type"
            parameters = [{"factor": 4.0}]
    """

    over = {"parameters": "parameters"}

    rope_type: ClassVar[str]
    """The name under which an installed plugin registers it."""
    parameters: ClassVar[Sequence[Mapping[str, Any]]]
    """``rope_parameters`` to try, each with a ``factor`` above 1."""
    dims: ClassVar[Sequence[int]] = (32, 64, 128)
    """Numbers of dimensions of a head that are rotated."""

    def test_frequencies_are_positive_and_fall(self, parameters: Mapping[str, Any]) -> None:
        import torch

        for dim in self.dims:
            found, scaling = self._call(parameters, dim)
            assert (found.dtype, tuple(found.shape)) == (torch.float32, (dim // 2,)), (
                f"{dim} dimensions have frequencies {found.dtype} {tuple(found.shape)}; expected float32 ({dim // 2},)"
            )
            assert (found.isfinite() & (found > 0)).all(), f"of {dim} dimensions, frequencies are {found}"
            assert (found.diff() <= 0).all(), f"of {dim} dimensions, frequencies do not fall: {found}"
            assert scaling > 0, f"the factor of cosines and sines is {scaling}; expected a positive number"

    def test_no_frequency_is_higher_than_without_scaling(self, parameters: Mapping[str, Any]) -> None:
        for dim in self.dims:
            found, _ = self._call(parameters, dim)
            assert (found <= _plain(dim) * (1 + 1e-6)).all(), f"of {dim} dimensions, a frequency grows with the context"
            assert (found < _plain(dim)).any(), f"of {dim} dimensions, no frequency depends on the factor"

    def test_a_factor_of_one_changes_no_frequency(self, parameters: Mapping[str, Any]) -> None:
        import torch

        for dim in self.dims:
            found, _ = self._call({**parameters, "factor": 1.0}, dim)
            assert torch.allclose(found, _plain(dim), rtol=1e-5), f"of {dim} dimensions, frequencies change at factor 1"

    def test_it_is_a_pure_function(self, parameters: Mapping[str, Any]) -> None:
        import torch

        given = {"rope_type": self.rope_type, "rope_theta": 10000.0, **parameters}
        before, function = copy.deepcopy(given), process_registry().load_rope_type(self.rope_type)
        first, second = function(given, self.dims[0]), function(given, self.dims[0])
        assert torch.equal(first[0], second[0]), "two calls return different frequencies"
        assert first[1] == second[1], "two calls return different factors of cosines and sines"
        assert given == before, f"it changes its parameters to {given}"

    def test_transformers_turns_by_these_frequencies(self, parameters: Mapping[str, Any]) -> None:
        import torch

        hosts = pytest.importorskip("arctic_plugins_huggingface", reason="its integration is not installed")
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        hosts.register()
        given = {"rope_type": self.rope_type, "rope_theta": 10000.0, **parameters}
        config = LlamaConfig(hidden_size=128, num_attention_heads=4, head_dim=32, rope_parameters=given)
        cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[1]]))
        frequencies, scaling = self._call(parameters, 32)
        assert torch.allclose(cos[0, 0, :16], frequencies.cos() * scaling, atol=1e-5), "transformers has other cosines"
        assert torch.allclose(sin[0, 0, :16], frequencies.sin() * scaling, atol=1e-5), "transformers has other sines"

    def _call(self, parameters: Mapping[str, Any], dim: int) -> tuple[Tensor, float]:
        given = {"rope_type": self.rope_type, "rope_theta": 10000.0, **parameters}
        found: tuple[Tensor, float] = process_registry().load_rope_type(self.rope_type)(given, dim)
        return found


def _plain(dim: int) -> Tensor:
    import torch

    return 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
