"""This machine's parts for fedloom, there or missing, with remedies. Looks and changes nothing; knows no recipe."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import psutil

from core_training.foundation.background import search_path
from core_training.foundation.environment import IGNORED, SETTINGS

PYTHON = (3, 11)
MEMORY_BYTES = 4 * 10**9
DISK_BYTES = 10 * 10**9
SERVER_PORT = 9092


class State(StrEnum):
    """`optional` is missing too, but only for a part of what fedloom does."""

    OK = "ok"
    OPTIONAL = "optional"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what is there and, where it falls short, what to do about it."""

    name: str
    state: State
    found: str
    remedy: str | None = None


def examine() -> list[Finding]:
    """All findings, the ones everything depends on first."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _packages, _torch, _cpu, _memory, _disk, _compiler, _extras, _flower, _ports, _offline, _environment,
    )  # fmt: skip
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= PYTHON:
        yield Finding("Python", State.OK, f"{version}, {sys.executable}")
    else:
        yield Finding("Python", State.MISSING, version, f"install Python {PYTHON[0]}.{PYTHON[1]} or newer")


def _packages() -> Iterator[Finding]:
    """The installed libraries against the versions that fedloom was built on."""
    from packaging.requirements import Requirement

    name = "libraries"
    try:
        required = [Requirement(line) for line in metadata.requires("fedloom") or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            name, State.OPTIONAL, "fedloom is used from its folder, not installed", "pip install --editable ."
        )
        return
    always = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [f"{one.name} {_version(one.name) or 'not installed'} ({one.specifier} is needed)" for one in always
             if not one.specifier.contains(_version(one.name) or "0", prereleases=True)]  # fmt: skip
    if wrong:
        yield Finding(name, State.MISSING, "; ".join(wrong), "pip install --constraint constraints.txt --editable .")
    else:
        yield Finding(name, State.OK, f"all {len(always)} in the versions needed")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", State.MISSING, f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding("torch", State.OK, f"{torch.__version__}, built for {build}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            yield Finding("GPU", State.OK, f"{card.name}, {_gigabytes(card.total_memory)}")
    elif not Path("/proc/driver/nvidia/version").exists():
        yield Finding("GPU", State.OPTIONAL, "none; training runs on the CPU", "nothing to do for small models")
    elif torch.version.cuda is None:
        remedy = "pip install --force-reinstall torch from an index that has its CUDA build"
        yield Finding("GPU", State.OPTIONAL, "there is one, and a torch built for the CPU only", remedy)
    else:
        remedy = f"a driver that serves CUDA {torch.version.cuda}, and access to /dev/nvidia*"
        yield Finding("GPU", State.OPTIONAL, "there is one, but torch cannot use it", remedy)


def _cpu() -> Iterator[Finding]:
    usable, fitted = len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False)
    yield Finding("cores", State.OK, f"{usable} usable ({fitted or 'unknown number'} physical)")
    if "avx512_bf16" in _cpu_flags():
        yield Finding("AVX512-BF16", State.OK, "yes: bfloat16 is fast here (model.dtype: bfloat16)")
    else:
        remedy = "keep model.dtype: float32 when training on the CPU"
        yield Finding("AVX512-BF16", State.OPTIONAL, "no: bfloat16 is emulated on the CPU", remedy)
    if "aes" in _cpu_flags():
        yield Finding("AES", State.OK, "yes: the masks of secure aggregation cost next to no time")
    else:
        remedy = "nothing to do for a few sites; with many, rounds take longer (privacy.secure_aggregation)"
        yield Finding("AES", State.OPTIONAL, "no: the masks of secure aggregation are made without it", remedy)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    found = f"{_gigabytes(memory.available)} free of {_gigabytes(memory.total)}"
    if memory.available >= MEMORY_BYTES:
        yield Finding("memory", State.OK, found)
    else:
        yield Finding(
            "memory", State.OPTIONAL, found, "close other programs, or keep to small models (model.dtype: bfloat16)"
        )


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{_gigabytes(free)} free in {Path.cwd()}"
    if free >= DISK_BYTES:
        yield Finding("disk", State.OK, found)
    else:
        yield Finding("disk", State.OPTIONAL, found, "free some, or write runs to another disk (--out DIR)")


def _compiler() -> Iterator[Finding]:
    """DeepSpeed compiles its CPU kernels at their first use."""
    for name, commands, remedy in (
        ("C++ compiler", (os.environ.get("CXX", "c++"), "g++", "clang++"), "apt install g++ (or your system's)"),
        ("ninja", ("ninja",), "pip install ninja"),
    ):
        path = next((found for command in commands if (found := _which(command))), None)
        if path is not None:
            yield Finding(name, State.OK, path)
        else:
            yield Finding(name, State.OPTIONAL, "not found; a DeepSpeed group needs it", remedy)


def _extras() -> Iterator[Finding]:
    for package, extra, purpose in (
        ("deepspeed", "deepspeed", "a recipe's deepspeed section"),
        ("ray", "simulation", "simulation.engine: ray"),
        ("dp-accounting", "privacy", "privacy.differential_privacy"),
        ("optuna", "search", "fedloom tune"),
    ):
        if (version := _version(package)) is not None:
            yield Finding(package, State.OK, version)
        else:
            remedy = f"pip install 'fedloom[{extra}]'"
            yield Finding(package, State.OPTIONAL, f"not installed; {purpose} needs it", remedy)


def _flower() -> Iterator[Finding]:
    if (version := _version("flwr")) is None:
        yield Finding("Flower", State.MISSING, "not found", "pip install --force-reinstall flwr")
    else:
        yield Finding("Flower", State.OK, version)


def _ports() -> Iterator[Finding]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", SERVER_PORT))
        except OSError as error:
            remedy = f"right if a fedloom server runs here; else give another: server init --port {SERVER_PORT + 100}"
            yield Finding(f"port {SERVER_PORT}", State.OPTIONAL, f"cannot be had: {error.strerror}", remedy)
        else:
            yield Finding(f"port {SERVER_PORT}", State.OK, "free for the server (127.0.0.1)")


def _offline() -> Iterator[Finding]:
    changed = [name for name, value in SETTINGS.items() if os.environ.get(name) != value]
    if changed:
        yield Finding(
            "calls home",
            State.MISSING,
            f"{', '.join(changed)} changed",
            "let core_training.foundation.environment set them",
        )
    else:
        yield Finding(
            "calls home", State.OK, f"none: {len(SETTINGS)} variables keep hub, telemetry and update checks off"
        )


def _environment() -> Iterator[Finding]:
    if IGNORED:
        remedy = "say in the recipe what it is to be (docs/recipe.md)"
        yield Finding("environment", State.OPTIONAL, f"not heeded: {', '.join(IGNORED)}", remedy)
    else:
        yield Finding("environment", State.OK, "nothing in it says otherwise than a recipe")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _which(command: str) -> str | None:
    return shutil.which(command, path=search_path())


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _gigabytes(size: float) -> str:
    return f"{size / 10**9:.1f} GB"
