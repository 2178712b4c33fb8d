"""``arctic train --hostfile``, with DeepSpeed's launcher."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from arctic_plugins.errors import ConfigError

__all__ = ["accelerator", "launch_on_hosts"]


def launch_on_hosts(arguments: Sequence[str], hostfile: str, environment: Mapping[str, str]) -> int:
    """Run ``arctic`` with ``arguments`` on the hosts listed in ``hostfile``, and wait for it.

    Each line of ``hostfile`` has the form ``name slots=processes``.

    Raises:
        ConfigError: the file does not exist, or DeepSpeed is not installed.
    """
    if not Path(hostfile).is_file():
        raise ConfigError(
            f"--hostfile {hostfile} does not exist",
            expected="a file with lines such as 'host slots=8'",
            fix="correct the path",
        )
    if shutil.which("deepspeed", path=environment["PATH"]) is None:
        raise ConfigError(
            "--hostfile needs DeepSpeed's launcher, which is not installed",
            fix="pip install 'arctic-plugins-deepspeed[deepspeed]', or use --nproc or torchrun",
        )
    command = [
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        hostfile,
        "--no_local_rank",
        "--module",
        "arctic_plugins.cli",
        *arguments,
    ]
    environment = {**accelerator(), **environment}
    return subprocess.run([sys.executable, *command], check=False, env=environment).returncode


def accelerator() -> dict[str, str]:
    """Return the variables that tell DeepSpeed if there is no GPU; it would otherwise print that it found none."""
    import torch

    return {} if torch.accelerator.is_available() else {"DS_ACCELERATOR": "cpu"}
