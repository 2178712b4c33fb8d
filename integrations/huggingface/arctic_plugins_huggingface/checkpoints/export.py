"""``arctic export`` and ``arctic convert``: encoded checkpoints to and from other libraries' formats, file by file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from arctic_plugins.claims import compress_names
from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CheckpointError, CodecError, named
from arctic_plugins.files import read_json
from arctic_plugins.frozen import METHOD, Codec, ModuleCodecs
from arctic_plugins.frozen.codec import check_buffers
from arctic_plugins.frozen.exporting import Converter, Exporter
from arctic_plugins.provenance import write_provenance
from arctic_plugins_huggingface.files.check import check_checkpoint
from arctic_plugins_huggingface.files.rewrite import Read, open_files, rewrite
from arctic_plugins_huggingface.files.staging import staged
from arctic_plugins_huggingface.loading.config import load_config, skeleton
from arctic_plugins_huggingface.loading.names import stored_names, stored_shapes
from arctic_plugins_huggingface.loading.weights import weight_specs

__all__ = ["convert_checkpoint", "export_checkpoint"]


def export_checkpoint(
    checkpoint: str | Path, directory: str | Path, format_name: str, *, trust_remote_code: bool = False
) -> Path:
    """Write the encoded ``checkpoint`` in the format that a plugin registered as ``format_name``.

    ``checkpoint`` is a directory; the result has the same files. Memory is bounded by the largest safetensors file.
    ``trust_remote_code`` allows to execute the checkpoint's own code, if its model needs it.

    Raises:
        PluginNotFoundError: no plugin exports to ``format_name``, or a codec's plugin is not installed.
        CheckpointError: ``checkpoint`` was not encoded by this project, or is damaged.
        CodecError: the format cannot represent the encoding of a module; names the module. No files are left behind.
        ConfigError: ``directory`` exists and is not empty.
    """
    source = Path(checkpoint)
    exporter: Exporter = process_registry().load_exporter(format_name)()
    config = _config(source)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{source} is not encoded",
            expected="a checkpoint written by 'arctic quantize' or 'arctic merge'",
            fix="quantize it",
        )
    check_checkpoint(source)
    codecs, shapes = ModuleCodecs.from_config(quantization), _shapes(source, trust_remote_code)
    encoded = {name: codec for name in shapes if (codec := codecs.codec_of(name)) is not None}
    config["quantization_config"] = exporter.quantization_config(
        encoded, [name for name in shapes if name not in encoded]
    )

    def tensors(name: str, read: Read) -> Mapping[str, Tensor]:
        buffers = {suffix: read(f"weight{suffix}") for suffix in encoded[name].layout(shapes[name])}
        check_buffers(encoded[name], buffers, shapes[name], f"{name}.weight")
        return exporter.tensors(encoded[name], buffers, shapes[name])

    with staged(directory) as draft:
        rewrite(source, draft, config, encoded, tensors)
    return Path(directory)


def convert_checkpoint(
    checkpoint: str | Path, directory: str | Path, format_name: str, *, trust_remote_code: bool = False
) -> list[str]:
    """Convert ``checkpoint`` from the format that a plugin registered as ``format_name`` to an encoded checkpoint.

    ``checkpoint`` is a directory. Modules whose stored weights are floating point stay plain. Memory is bounded by the
    largest safetensors file. ``trust_remote_code`` allows to execute the checkpoint's own code, if its model needs it.

    Returns:
        A line for every module and its codec; layers that are encoded alike share a line.

    Raises:
        PluginNotFoundError: no plugin converts from ``format_name``.
        CheckpointError: ``checkpoint`` is damaged, or lacks information that the format needs.
        CodecError: a weight does not follow the format, or no codec can represent it; names the module. No files are
            left behind.
        ConfigError: ``directory`` exists and is not empty.
    """
    source = Path(checkpoint)
    converter_class: type[Converter] = process_registry().load_converter(format_name)
    config = _config(source)
    if config.get("quantization_config", {}).get("quant_method") == METHOD:
        raise CheckpointError(f"{source} is already encoded by this project", fix="use it as it is")
    converter = converter_class(_quantization(source, config, converter_class.config_files))
    shapes, stored = _shapes(source, trust_remote_code), _dtypes(source)
    encoded: dict[str, Codec] = {}
    for name, shape in shapes.items():
        if stored.get(f"{name}.weight") in ("U8", "I8"):
            with named(name, CodecError):
                encoded[name] = converter.codec(shape)
    if not encoded:
        raise CheckpointError(
            f"{source} has no linear weight stored as bytes",
            expected=f"a checkpoint in the format {format_name}",
            fix="quantize it",
        )
    codecs = ModuleCodecs.from_owners(encoded, shapes)
    config["quantization_config"] = codecs.to_config()

    def tensors(name: str, read: Read) -> Mapping[str, Tensor]:
        buffers = converter.buffers(read("weight"), shapes[name])
        check_buffers(encoded[name], buffers, shapes[name], f"{name}.weight")
        return {f"weight{suffix}": buffer for suffix, buffer in buffers.items()}

    with staged(directory) as draft:
        rewrite(source, draft, config, encoded, tensors)
        for name in converter_class.config_files:
            (draft / name).unlink(missing_ok=True)
        write_provenance(draft, {})
    return [
        f"{pattern}: {kind}"
        for pattern, kind in compress_names({name: codec.describe() for name, codec in encoded.items()}, shapes).items()
    ]


def _config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json", expected="a checkpoint directory", fix="correct the path")
    return read_json(source / "config.json")


def _quantization(source: Path, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return a checkpoint's quantization settings, from ``config.json`` or one of the other files ``names``."""
    found = config.get("quantization_config")
    for name in names:
        if not isinstance(found, dict) and (source / name).is_file():
            found = read_json(source / name)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{source} does not specify how it is quantized",
            expected=f"quantization_config in config.json{''.join(f', or {name}' for name in names)}",
            fix="add it",
        )
    return found


def _shapes(source: Path, trust_remote_code: bool) -> dict[str, tuple[int, int]]:
    config = load_config(source, trust_remote_code=trust_remote_code)
    config.quantization_config = None
    model = skeleton(config, trust_remote_code=trust_remote_code)
    specs = weight_specs(model)
    return stored_shapes(specs, stored_names(model, specs))


def _dtypes(source: Path) -> dict[str, str]:
    with ExitStack() as stack:
        return {
            key: file.get_slice(key).get_dtype()
            for file in open_files(source, stack).values()
            for key in file.keys()  # noqa: SIM118
        }
