"""The checks of vLLM that ``arctic doctor`` runs in a separate process."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from arctic_plugins.discovery import process_registry
from arctic_plugins.plugin import PROJECT, Finding
from arctic_plugins.resolver import host_version
from arctic_plugins_vllm.host import GROUP

__all__ = ["check_worker"]


def check_worker() -> Iterator[Finding]:
    """Load vLLM's general plugins as its workers do, and check that this project is among them."""
    subject = "vllm worker"
    if host_version("vllm") is None or not any(point.name == PROJECT for point in entry_points(group=GROUP)):
        yield Finding("ok", subject, "skipped: vLLM or arctic-plugins-vllm is not installed")
        return
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # vllm/plugins/__init__.py, 0.32.0: ignores exceptions of entry points
    try:
        get_quantization_config("arctic")
    except ValueError as error:
        fix = "see the lines that vLLM logs when it starts; is VLLM_PLUGINS set without arctic_plugins?"
        yield Finding("error", subject, f"the quantization method 'arctic' is not registered: {error}", fix)
        return
    registry = process_registry()
    for name, failure in registry.failures.items():
        yield Finding("error", subject, f"plugin '{name}' is not loaded: {failure}")
    for codec in registry.codec_types():
        try:
            registry.load_codec(codec)
        except Exception as error:  # an import can raise any exception, and all are reported
            yield Finding("error", subject, f"codec '{codec}' cannot be imported: {type(error).__name__}: {error}")
    yield Finding(
        "ok",
        subject,
        f"the method 'arctic' is registered, with the codecs: {', '.join(registry.codec_types()) or 'none'}",
    )
