"""The compute dtype if the user sets none: the checkpoint's dtype if the device multiplies it natively, else float32.

Loading, training, generating, plans, the doctor and serving all use this module. The files that are written do not
depend on it.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = [
    "compute_dtype",
    "default_device",
    "dtype_name",
    "is_native",
    "measure_products",
    "processor",
    "reason_for",
    "warning_for",
]


def is_native(dtype: torch.dtype, device: str | None = None) -> bool:
    """Return whether ``device`` multiplies matrices of ``dtype`` with instructions made for it.

    torch multiplies bfloat16 and float16 on other processors as well, but with a loop that takes ten to several hundred
    times as long as float32.

    Args:
        dtype: of both factors.
        device: a torch device type; by default the accelerator if there is one, else ``"cpu"``.
    """
    import torch

    device = device or default_device()
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return True
    # oneDNN's own answer, which honors ONEDNN_MAX_CPU_ISA; on x86-64 it is also true if AVX-512 emulates the dtype.
    library = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return False
    known = library._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else library._is_mkldnn_fp16_supported()
    if not known or platform.machine().lower() not in ("x86_64", "amd64"):
        return bool(known)
    found, short = torch.cpu.get_capabilities(), "bf16" if dtype == torch.bfloat16 else "fp16"
    return bool(found.get(f"avx512_{short}") or found.get(f"amx_{short}"))


def compute_dtype(stored: torch.dtype, device: str | None = None) -> torch.dtype:
    """Return the dtype that ``auto`` selects for a checkpoint in ``stored``; see :func:`is_native`."""
    import torch

    return stored if is_native(stored, device) else torch.float32


def reason_for(stored: torch.dtype, chosen: torch.dtype, device: str | None = None) -> str:
    """Return a line that explains a ``chosen`` dtype other than the checkpoint's; "" if they are the same."""
    if stored == chosen:
        return ""
    name, where = dtype_name(stored), _described(device or default_device())
    why = (
        f"which {where} does not multiply natively"
        if not is_native(stored, device)
        else "but another dtype was requested"
    )
    return f"computing in {dtype_name(chosen)}: the checkpoint is in {name}, {why}"


def warning_for(chosen: torch.dtype, what: str, fix: str, device: str | None = None) -> str:
    """Return a warning about a dtype that the user chose and the device does not multiply natively; "" if it does.

    Args:
        chosen: the dtype.
        what: where it was chosen, for example ``load.dtype``.
        fix: what to set instead.
        device: see :func:`is_native`.
    """
    if is_native(chosen, device):
        return ""
    where = _described(device or default_device())
    return (
        f"{what} asks for {dtype_name(chosen)}, which {where} does not multiply natively: it is ten to several hundred "
        f"times slower than float32; {fix}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def measure_products(size: int = 256, runs: int = 3) -> dict[str, float]:
    """Measure ``grad @ weight`` for each dtype on one thread of the CPU: the seconds of the best of ``runs``.

    Both are ``size`` x ``size`` matrices. There is only one thread because several would wait for each other if another
    process kept a core busy.
    """
    import torch

    seconds: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            grad, weight = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
            best = float("inf")
            for _ in range(runs):
                started = time.perf_counter()
                grad @ weight
                best = min(best, time.perf_counter() - started)
            seconds[dtype_name(dtype)] = best
    finally:
        torch.set_num_threads(threads)
    return seconds


def default_device() -> str:
    """Return the accelerator's device type if there is one, else ``"cpu"``."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator is not None else "cpu"


def _described(device: str) -> str:
    return "this processor" if device == "cpu" else f"this device ({device})"


def processor() -> tuple[str, set[str]]:
    """Return the name of the first processor and the flags that Linux reports for it; no flags on other systems."""
    model, flags = platform.processor() or platform.machine(), set()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        fields = dict(
            line.partition(":")[::2]
            for line in cpuinfo.read_text(errors="replace").split("\n\n")[0].splitlines()
            if ":" in line
        )
        named = {key.strip(): value.strip() for key, value in fields.items()}
        model, flags = named.get("model name", model), set(named.get("flags", named.get("Features", "")).split())
    return model, flags
