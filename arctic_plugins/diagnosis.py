"""The checks of ``arctic doctor``: the machine, what is installed, and whether it works where it will run.

No plugin is imported in this process: each is loaded in a process of its own, which may raise, exit, crash or hang.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import Distribution, distributions, entry_points
from pathlib import Path

from arctic_plugins.compute import compute_dtype, dtype_name, measure_products, processor
from arctic_plugins.discovery import identity, installed_plugins, load_plugin, new_plugin_manager
from arctic_plugins.ending import leave
from arctic_plugins.errors import ArcticDeprecationWarning, ArcticError, HostVersionError
from arctic_plugins.host import GROUP, Host, host_failures, hosts
from arctic_plugins.patches import patches
from arctic_plugins.plugin import CONTRACT, PROJECT, Finding
from arctic_plugins.registry import Registry, load
from arctic_plugins.resolver import check_hosts, host_range, host_version
from arctic_plugins.stack import Stack, read_yaml

__all__ = ["diagnose"]

_GROUPS = ("arctic_plugins.commands", GROUP)
"""Entry-point groups in which each name must be unique."""
_TIMEOUT = 180.0
"""Seconds for a child process: on a cold disk, the first import of torch or a host takes most of a minute."""


def diagnose(recipe: str | Path | None = None) -> list[Finding]:
    """Run every check; with a ``recipe``, also resolve its stack and report which plugins it enables."""
    known = [host for _, host in sorted(hosts().items(), reverse=True)]
    slow: list[Callable[[], list[Finding]]] = [  # the longest first
        *(partial(_in_child, _where(host), "host", host.name) for host in known),
        lambda: _in_child("torch", "torch"),
        lambda: _in_child("commands", "commands"),
    ]
    enabled, findings = _recipe(recipe)
    named = list(_plugins(slow, findings))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        started = [pool.submit(check) for check in slow]
        findings = [*_machine(), *_compilers(), *_distributions(), *_hosts(), *findings]
        results = [future.result() for future in started]
    workers, (machine, commands, *plugins) = results[: len(known)], results[len(known) :]
    for name, result in zip(named, plugins, strict=True):
        note = "" if enabled is None else f" ({'enabled' if name in enabled else 'not enabled'})"
        findings += [Finding(found.status, found.subject, found.text + note, found.fix) for found in result]
    return [*machine, *findings, *commands, *(found for worker in reversed(workers) for found in worker)]


def _recipe(recipe: str | Path | None) -> tuple[set[str] | None, list[Finding]]:
    if recipe is None:
        return None, []
    try:
        plugins = read_yaml(recipe).get("plugins") or {}
    except ArcticError as error:
        return set(), [Finding("error", "recipe", str(error))]
    enabled = {str(name) for name in plugins} if isinstance(plugins, dict) else set()
    missing = sorted(enabled - installed_plugins().keys())
    return enabled, [
        *(
            Finding(
                "error",
                f"plugin {name}",
                "enabled, but not installed",
                f"pip install arctic-plugins-{name}, or remove it from the recipe",
            )
            for name in missing
        ),
        *([] if missing else _in_child("recipe", "recipe", str(recipe))),
    ]


def _plugins(slow: list[Callable[[], list[Finding]]], findings: list[Finding]) -> Iterator[str]:
    for name, providers in installed_plugins().items():
        if len(providers) > 1:
            owners = " and ".join(sorted(f"{provider.distribution} {provider.version}" for provider in providers))
            findings.append(
                Finding(
                    "error",
                    f"plugin {name}",
                    f"provided by {owners}; expected only one of them",
                    "uninstall one of the two",
                )
            )
            continue
        slow.append(lambda name=name: _in_child(f"plugin {name}", "plugin", name))  # type: ignore[misc]
        yield name


def _machine() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    model, flags = processor()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "sve", "bf16")
    yield Finding(
        "ok",
        "cpu",
        f"{model}, {os.cpu_count()} cores, "
        f"{' '.join(flag for flag in wanted if flag in flags) or 'no known vector flags'}",
    )


def _compilers() -> Iterator[Finding]:
    compiler = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        yield Finding(
            "warning", "c++ compiler", "none found; torch.compile and hosts that use it need one", "install g++"
        )
    else:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, timeout=30)
        yield Finding("ok", "c++ compiler", (done.stdout or done.stderr).partition("\n")[0] or compiler)
    nvcc = shutil.which("nvcc")
    yield Finding("ok", "cuda compiler", nvcc or "no nvcc; nothing in this project needs it")


def _distributions() -> Iterator[Finding]:
    groups = [*_GROUPS, *(group for host in hosts().values() for group in host.groups)]
    ours: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for found in distributions():
        if not _has_metadata(found):
            name = getattr(found, "_path", found)
            yield Finding(
                "warning",
                "metadata",
                f"{name} has no name or version",
                "remove the directory, or reinstall its distribution",
            )
            continue
        name, version = identity(found)
        if name.startswith("arctic-plugins") or any(point.group in {PROJECT, *groups} for point in found.entry_points):
            seen[name] += 1
            if name.startswith("arctic-plugins"):
                ours.setdefault(name, version)
    for name, count in seen.items():
        if count > 1:
            yield Finding(
                "error",
                "metadata",
                f"{name} is installed {count} times; expected once",
                f"run 'pip uninstall {name}' {count} times, then install it again",
            )
    if len(set(ours.values())) > 1:
        listed = ", ".join(f"{name} {version}" for name, version in sorted(ours.items()))
        yield Finding(
            "error",
            "versions",
            f"{listed}; expected the same version, since they are released together",
            "upgrade all of them",
        )
    elif ours:
        yield Finding("ok", "versions", f"{', '.join(sorted(ours))}: {next(iter(ours.values()))}; contract {CONTRACT}")
    for group in groups:
        owners: dict[str, list[str]] = {}
        for point in entry_points(group=group):
            owners.setdefault(point.name, []).append(identity(point.dist)[0] if point.dist else "unknown")
        for name, several in owners.items():
            if len(set(several)) > 1:
                text = f"'{name}' in {group} is provided by {' and '.join(sorted(set(several)))}"
                yield Finding("error", "duplicate names", f"{text}; expected only one of them", "uninstall the others")


def _has_metadata(found: Distribution) -> bool:
    try:
        return bool(found.metadata["Name"] and found.version)
    except Exception:  # importlib.metadata raises whatever its parser raises
        return False


def _hosts() -> Iterator[Finding]:
    for name, failure in host_failures().items():
        yield Finding("error", name, str(failure))
    for host in hosts():
        declared, found = host_range(host), host_version(host)
        if declared is None:
            yield Finding(
                "ok", host, f"{' '.join(found) if found else 'not installed'}; no integration for it is installed"
            )
        elif found is None:
            yield Finding(
                "warning",
                host,
                f"not installed; {declared[0]} needs {host}{declared[1]}",
                f"pip install '{host}{declared[1]}'",
            )
        else:
            try:
                check_hosts((), host)
                yield Finding("ok", host, f"{' '.join(found)}, in {declared[1]}")
            except HostVersionError as error:
                yield Finding("error", host, str(error))


def _where(host: Host) -> str:
    """Return the place where the host is registered, as shown to users."""
    return f"{host.name} worker" if host.probe else f"{host.name} registration"


def _in_child(subject: str, *arguments: str) -> list[Finding]:
    """Run one of the checks below in a fresh interpreter, as a host's workers are.

    The findings come back in a file, so that what the check prints cannot be mistaken for them.
    """
    with tempfile.TemporaryDirectory() as directory:
        answer = Path(directory) / "findings.json"
        command = [sys.executable, "-m", "arctic_plugins.diagnosis", str(answer), *arguments]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_TIMEOUT)
        except OSError as error:  # no memory for another process, or no permission to start one
            return [
                Finding(
                    "error",
                    subject,
                    f"cannot start a process for this check: {error}",
                    "check the limits of this user (ulimit -a)",
                )
            ]
        except subprocess.TimeoutExpired:
            return [
                Finding(
                    "error",
                    subject,
                    f"did not load within {_TIMEOUT:.0f} s",
                    "repair or uninstall the package that hangs on import",
                )
            ]
        if not answer.is_file():
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
            return [
                Finding(
                    "error",
                    subject,
                    f"its process ended with {how}{': ' + last[0] if last else ''}",
                    "repair or uninstall it",
                )
            ]
        return [Finding(**found) for found in json.loads(answer.read_text(encoding="utf-8"))]


# Everything below runs in child processes only.


def _check_plugin(name: str) -> Iterator[Finding]:
    subject = f"plugin {name}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ArcticDeprecationWarning)
        plugin = load_plugin(name)
        manager = new_plugin_manager(only=("register", "diagnose"))
        manager.register(plugin, name)
        manager.hook.register(registry=Registry())
    provider = installed_plugins()[name][0]
    slots = ", ".join(sorted(plugin.slots)) or "no slot"
    yield Finding("ok", subject, f"{provider.distribution} {provider.version}, fills {slots}")
    for text in dict.fromkeys(f"{Path(each.filename).name}, line {each.lineno}: {each.message}" for each in caught):
        yield Finding("warning", subject, text, f"upgrade {provider.distribution}, or report it to its authors")
    for host in plugin.hosts:
        if host_version(host) is not None:
            try:
                check_hosts((plugin,), host)
            except HostVersionError as error:
                yield Finding("error", subject, str(error))
    for findings in manager.hook.diagnose():
        yield from (Finding(found.status, f"{subject}: {found.subject}", found.text, found.fix) for found in findings)


def _check_recipe(path: str) -> Iterator[Finding]:
    stack = Stack.from_file(path)
    yield Finding(
        "ok",
        "recipe",
        f"the stack resolves, in this order: {', '.join(plugin.name for plugin in stack) or 'no plugins'}",
    )


def _check_torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding(
            "warning", "torch", f"cannot be imported: {error}", "install torch; encoding, training and serving need it"
        )
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    yield Finding("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, computes on {device}")
    computed = dtype_name(compute_dtype(torch.bfloat16))
    native = (
        "multiplied natively"
        if computed == "bfloat16"
        else f"not multiplied natively: checkpoints in bfloat16 are computed in {computed}"
    )
    measured = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in measure_products().items())
    yield Finding("ok", "compute dtype", f"bfloat16 is {native}; 256 x 256 products on one CPU thread: {measured}")


def _check_commands() -> Iterator[Finding]:
    names = []
    for point in entry_points(group="arctic_plugins.commands"):
        try:
            point.load()
            names.append(point.name)
        except (Exception, SystemExit) as error:  # an import can raise anything, and all of it is reported
            owner = identity(point.dist)[0] if point.dist else "unknown"
            text = f"'{point.name}' of {owner} cannot be imported: {type(error).__name__}: {error}"
            yield Finding("error", "command", text, f"reinstall {owner}, or uninstall it")
    yield Finding("ok", "commands", ", ".join(sorted(names)))


def _check_host(name: str) -> Iterator[Finding]:
    """Register what is installed with a host, through its probe if it has one, and list the patches that were made."""
    host = hosts()[name]
    if host.probe is not None:
        yield from load(host.probe)()
    elif host_version(name) is not None:
        load(host.register)()
    yield from (Finding("ok", "patch", str(made)) for made in patches())


_CHECKS: dict[str, Callable[..., Iterable[Finding]]] = {
    "plugin": _check_plugin,
    "recipe": _check_recipe,
    "torch": _check_torch,
    "commands": _check_commands,
    "host": _check_host,
}


def _main(answer: str, check: str, *arguments: str) -> None:
    gc.disable()  # it takes a fifth of the time of long imports, and frees nothing
    findings: list[Finding] = []
    try:
        findings.extend(_CHECKS[check](*arguments))
    except ArcticError as error:
        findings.append(Finding("error", " ".join([check, *arguments]), str(error)))
    except (Exception, SystemExit) as error:  # whatever was raised is the finding
        findings.append(
            Finding(
                "error", " ".join([check, *arguments]), f"{type(error).__name__}: {error}", "repair or uninstall it"
            )
        )
    Path(answer).write_text(json.dumps([asdict(found) for found in findings]), encoding="utf-8")


if __name__ == "__main__":
    _main(*sys.argv[1:])
    leave()
