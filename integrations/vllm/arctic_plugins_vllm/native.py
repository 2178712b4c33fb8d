"""Layers whose bytes are a format of vLLM's own, handed to vLLM's kernels (Marlin, CUTLASS and others).

Nothing here knows a codec. An exporter that is exact for a codec (:attr:`arctic_plugins.frozen.Exporter.exact`)
describes the weights as a checkpoint of that format would. From this description, vLLM makes the method that it has for
such a layer, with the kernel that it chooses for the device. The layer's weights are loaded, checked and reloaded as
buffers of the codec; each time they are complete, the exporter's tensors replace them, and vLLM's method processes
these and computes from then on.

Read in vllm 0.32.0. Tested on CPU; never run on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CheckpointError, CodecError, ConfigError
from arctic_plugins.frozen import Codec, Exporter
from arctic_plugins_vllm.compat import (
    QuantizationConfig,
    chosen_kernel,
    in_tree_config,
    init_logger,
    model_dtype,
    note_for_compilation,
    on_gpu,
    skips_rounding,
)

__all__ = ["VARIABLE", "Format", "Native", "are_wanted", "choose", "formats_of"]

logger = init_logger(f"vllm.{__name__}")  # vLLM shows messages of INFO from its own loggers only

VARIABLE = "ARCTIC_VLLM_KERNELS"
"""The environment variable that selects who computes what both can: ``native`` (vLLM's kernels, on any device and in
any dtype) or ``ours``. Unset, vLLM's kernels compute on CUDA and ROCm in bfloat16. On CPU, the codecs are faster. In
float16, Marlin rounds scales to float16, where small ones lose bits; in float32 it does not compute.
"""


def may_be_wanted() -> bool:
    """Return whether vLLM's kernels are to be used on this machine, for a model in some dtype.

    Raises:
        ConfigError: the environment variable has another value than those of :data:`VARIABLE`.
    """
    setting = os.environ.get(VARIABLE, "")
    if setting not in ("", "native", "ours"):
        raise ConfigError(f"{VARIABLE}={setting}", expected="native or ours", fix="correct it, or unset it")
    return setting == "native" or (not setting and on_gpu())


def are_wanted() -> bool:
    """Return whether vLLM's kernels are to be used where they compute what a codec computes.

    Raises:
        ConfigError: see :func:`may_be_wanted`.
    """
    if not may_be_wanted():
        return False
    if os.environ.get(VARIABLE):  # asked for, whatever the device and the dtype
        return True
    if (dtype := model_dtype()) != torch.bfloat16:
        logger.info_once("%s: encoded weights are computed by their codecs, not by vLLM (%s)", dtype, VARIABLE)
    return dtype == torch.bfloat16


@dataclass(frozen=True)
class Format:
    """A format that holds the weights of some codecs unchanged, and vLLM's config for it."""

    name: str
    exporter: Exporter
    config: QuantizationConfig


def formats_of(codecs: Sequence[Codec], packed_modules_mapping: Mapping[str, list[str]]) -> list[Format]:
    """Return the formats of vLLM's own that hold the weights of ``codecs``, which belong to one layer, unchanged."""
    registry, found = process_registry(), []
    for name in registry.exporter_names():
        exporter_class: type[Exporter] = registry.load_exporter(name)
        if not exporter_class.exact:
            continue
        exporter = exporter_class()
        try:
            stated = exporter.quantization_config({str(at): codec for at, codec in enumerate(codecs)}, [])
        except CodecError:
            continue
        config_class = in_tree_config(stated["quant_method"])
        if config_class is not None:
            config = config_class.from_config(stated)
            config.packed_modules_mapping = packed_modules_mapping
            found.append(Format(name, exporter, config))
    if not found:
        described = " and ".join(dict.fromkeys(codec.describe() for codec in codecs))
        logger.info_once("%s: computed by the codec (vLLM has no format with exactly these numbers)", described)
    return found


@dataclass
class Native:
    """vLLM's own method for a layer, waiting for the layer's weights.

    Attributes:
        exporter: converts the codec's buffers to the tensors of the method's parameters.
        method: vLLM's method.
        kernel: what computes, for users.
        parameters: the method's parameters, on the meta device.
        attributes: what else the method set on its layer, to be set on the real one.
        has_taken: whether the method computes, because it has taken the weights.
    """

    exporter: Exporter
    method: Any
    kernel: str
    parameters: dict[str, Tensor]
    attributes: dict[str, Any]
    has_taken: bool = field(default=False, init=False)

    def take(self, layer: Any, prefix: str, own: Iterable[str], tensors: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Replace the parameters ``own`` of ``layer`` by those of vLLM's method, and let the method process them.

        Args:
            layer: vLLM's layer, on its device.
            prefix: its name.
            own: the names of its parameters that hold the codec's buffers.
            tensors: returns the values of the method's parameters, or raises CodecError if the format does not have
                these numbers. The layer is then unchanged.

        Returns:
            Whether the method computes from now on.

        Raises:
            CheckpointError: the method computes already, and the reloaded weights are not numbers of the format.
                Captured graphs and compiled code can no longer change to another kernel.
        """
        try:
            values = tensors()
            self._check(values)
        except CodecError as error:
            if self.has_taken:
                raise CheckpointError(
                    f"{prefix} cannot be reloaded into vLLM's {self.kernel}: {error}",
                    fix=f"restart with {VARIABLE}=ours",
                ) from error
            logger.warning("%s: not computed by vLLM's %s: %s", prefix, self.kernel, error)
            return False
        for name in own:
            delattr(layer, name)
        vars(layer).update(self.attributes)
        for name, empty in self.parameters.items():
            layer.register_parameter(name, _filled(empty, values[name]))
        self.method.process_weights_after_loading(layer)
        self.has_taken = True
        return True

    def _check(self, values: Mapping[str, Tensor]) -> None:
        found, expected = (
            {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            for tensors in (values, self.parameters)
        )
        if found != expected:
            raise CodecError(f"the exported tensors are {found}", expected=f"vLLM's parameters {expected}")


def choose(
    formats: Iterable[Format], layer: Any, prefix: str, weights: str, create: Callable[[Any, Any], None]
) -> Native | None:
    """Return vLLM's method for ``layer`` if it has a kernel for one of ``formats`` here, and log who computes.

    Args:
        formats: see :func:`formats_of`.
        layer: vLLM's layer. It is not changed.
        prefix: its name.
        weights: a description of its weights for the log. There is one line for each description.
        create: ``(method, layer)``: calls the method's ``create_weights`` for the layer.
    """
    reasons = []
    for form in formats:
        twin, before = _twin(layer), dict(vars(layer))
        try:
            method = form.config.get_quant_method(twin, prefix)
            with torch.device("meta"):  # weights need no memory twice
                create(method, twin)
        except (AssertionError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            why = shorten(str(error) or type(error).__name__, 400)
            reasons.append(f"{form.name}: {why}")  # vLLM has no kernel for the device, dtype or shape
            continue
        attributes = {
            name: value
            for name, value in vars(twin).items()
            if name not in _OWN_TABLES and (name not in before or before[name] is not value)
        }
        kernel = chosen_kernel(method, twin)
        if kernel is None:
            reasons.append(f"{form.name}: vLLM has no kernel for it here")
        elif skips_rounding(form.config, kernel):
            reasons.append(f"{form.name}: vLLM's {kernel} would not round activations")
        elif any(isinstance(value, Tensor) for value in attributes.values()):
            reasons.append(f"{form.name}: vLLM's {kernel} has tensors of its own")
        else:
            logger.info_once("%s: computed by vLLM's %s", weights, kernel)
            note_for_compilation(VARIABLE, "native")
            parameters = dict(twin.named_parameters(recurse=False))
            return Native(form.exporter, method, kernel, parameters, attributes)
    if reasons:
        logger.info_once("%s: computed by the codec (%s)", weights, "; ".join(reasons))
    return None


_OWN_TABLES = ("_parameters", "_buffers", "_modules")


def _filled(empty: Tensor, values: Tensor) -> nn.Parameter:
    """Return a parameter of the class and with the attributes of ``empty``, and with the memory of ``values``.

    As in ``model_loader/reload/meta.py``, because parameters of vLLM have constructors of their own.
    """
    parameter = nn.Parameter(values, requires_grad=False)
    parameter.__class__ = type(empty)  # type: ignore[assignment]
    parameter.__dict__.update(empty.__dict__)
    return parameter


def _twin(layer: nn.Module) -> Any:
    """Return a copy of ``layer`` without parameters, on which vLLM's method can set what it wants.

    Methods for formats that exporters write register no buffers and no modules (0.32.0).
    """
    twin = object.__new__(type(layer))
    vars(twin).update(vars(layer), _parameters={}, _buffers=dict(layer._buffers), _modules=dict(layer._modules))
    return twin
