"""``arctic export``: an encoded checkpoint in another library's format, written file by file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from arctic_plugins.discovery import process_registry
from arctic_plugins.errors import CheckpointError, CodecError
from arctic_plugins.frozen import METHOD, ModuleCodecs
from arctic_plugins.frozen.codec import check_buffers
from arctic_plugins.frozen.exporting import Exporter
from arctic_plugins.provenance import FILE_NAME, read_json
from arctic_plugins_huggingface.checkpoints import check_checkpoint
from arctic_plugins_huggingface.loading import linear_modules, load_config, skeleton
from arctic_plugins_huggingface.saving import staged

__all__ = ["export_checkpoint"]

INDEX = "model.safetensors.index.json"


def export_checkpoint(checkpoint: str | Path, directory: str | Path, format_name: str) -> Path:
    """Write the encoded ``checkpoint`` (a directory) in the format that a plugin registered as ``format_name``, with the same files.

    Memory is bounded by the largest safetensors file.

    Raises:
        PluginNotFoundError: nobody exports to ``format_name``, or a codec's plugin is not installed.
        CheckpointError: ``checkpoint`` is not one that this project encoded, or is damaged.
        CodecError: the format cannot hold what a module is encoded as; names the module. Nothing is left behind.
        ConfigError: ``directory`` exists and is not empty.
    """
    source = Path(checkpoint)
    exporter: Exporter = process_registry().load_exporter(format_name)()
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json", expected="the directory of an encoded checkpoint", fix="correct the path")
    config = read_json(source / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(f"{source} is not encoded", expected="a checkpoint that 'arctic quantize' or 'arctic merge' wrote", fix="quantize it")
    check_checkpoint(source)
    codecs = ModuleCodecs.from_config(quantization)
    loaded = load_config(source)
    loaded.quantization_config = None
    shapes = {name: spec.shape for name, spec in linear_modules(skeleton(loaded, "auto")).items()}
    encoded = {name: codec for name in shapes if (codec := codecs.codec_of(name)) is not None}
    config["quantization_config"] = exporter.quantization_config(encoded, [name for name in shapes if name not in encoded])
    with staged(directory) as draft, ExitStack() as stack:
        files = {path.name: stack.enter_context(safe_open(path, "pt")) for path in sorted(source.glob("*.safetensors"))}
        where = {key: file for file in files.values() for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping

        def converted(key: str) -> Iterator[tuple[str, Tensor]]:
            name, _, suffix = key.rpartition(".weight")
            if not name or name not in encoded:
                yield key, where[key].get_tensor(key)
            elif not suffix:  # the module's other buffers come with its codes
                buffers = {s: where[f"{name}.weight{s}"].get_tensor(f"{name}.weight{s}") for s in encoded[name].layout(shapes[name])}
                check_buffers(encoded[name], buffers, shapes[name], f"{name}.weight")
                try:
                    yield from ((f"{name}.{part}", tensor) for part, tensor in exporter.tensors(encoded[name], buffers, shapes[name]).items())
                except CodecError as error:
                    raise CodecError(f"{name}: {error.found}", expected=error.expected, fix=error.fix) from error

        weight_map: dict[str, str] = {}
        total = 0
        for file_name, file in files.items():
            tensors = {new: tensor for key in file.keys() for new, tensor in converted(key)}  # noqa: SIM118
            save_file(tensors, draft / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file_name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if (source / INDEX).is_file():
            (draft / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX, FILE_NAME, "config.json"):
                shutil.copy(path, draft / path.name)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Path(directory)
