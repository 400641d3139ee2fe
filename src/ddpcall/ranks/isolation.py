"""What one task may not leave behind for the next in a warm worker.

`RankState` remembers a worker's settings when it starts and puts them back after every task;
`find_leaks` names what cannot be put back: threads and child processes still running.

Blind to: state inside the user's own modules and in C++ libraries, patched classes, file descriptors.
"""

import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from ddpcall import torch_internals as internals
from ddpcall.accelerator import DEVICE_TYPES, reset_devices

_LEAK_GRACE_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGHUP)


def _autocast_settings(device_type: str) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    return [
        (
            lambda: torch.is_autocast_enabled(device_type),
            lambda on: torch.set_autocast_enabled(device_type, on),
        ),
        (
            lambda: torch.get_autocast_dtype(device_type),
            lambda dtype: torch.set_autocast_dtype(device_type, dtype),
        ),
    ]


_TORCH_SETTINGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    *(setting for device_type in DEVICE_TYPES for setting in _autocast_settings(device_type)),
]
_GLOBAL_HOOKS = [name for name in vars(torch_module) if name.startswith("_global_") and name.endswith("_hooks")]


class RankState:
    """A worker's settings at one moment.

    Covers default dtype and device, grad mode, anomaly and deterministic modes, threads, autocast, dynamo and
    inductor configuration, global module hooks, warnings filters, signal handlers and the current CUDA device.
    The environment, the directory and `sys.path` come with each task instead.
    """

    def __init__(self) -> None:
        self._torch = [read() for read, _ in _TORCH_SETTINGS]
        self._hooks = {name: dict(getattr(torch_module, name)) for name in _GLOBAL_HOOKS}
        self._filters = list(warnings.filters)
        self._signals = {number: signal.getsignal(number) for number in _SIGNALS}
        self._configs = {name: config.get_config_copy() for name, config in _compiler_configs().items()}

    def restore(self) -> None:
        """Put everything back and drop compiled code."""
        if torch.get_default_device() != torch.device("cpu"):
            torch.set_default_device(None)
        for (read, write), value in zip(_TORCH_SETTINGS, self._torch, strict=True):
            if read() != value:
                write(value)
        self._restore_python()
        self._restore_compilers()
        reset_devices()

    def _restore_python(self) -> None:
        for name, hooks in self._hooks.items():
            registered = getattr(torch_module, name)
            registered.clear()
            registered.update(hooks)
        for number, handler in self._signals.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if list(warnings.filters) != self._filters:
            warnings.resetwarnings()  # also invalidates the "already shown" registries
            warnings.filters[:] = self._filters  # pyright: ignore[reportIndexIssue]
        sys.last_value = sys.last_traceback = None  # they keep a failed task's DDP alive

    def _restore_compilers(self) -> None:
        if (dynamo := internals.DYNAMO.if_imported()) is None:
            return
        dynamo.reset()
        for name, config in _compiler_configs().items():
            if name in self._configs and config.get_config_copy() != self._configs[name]:
                config.load_config(self._configs[name])


def _compiler_configs() -> dict[str, Any]:
    found = {path: entry.if_imported() for path, entry in internals.COMPILER_CONFIGS.items()}
    return {path: config for path, config in found.items() if config is not None}


def seed_everything(seed: int = 0) -> None:
    """Seed Python, NumPy (if imported) and torch, the same on every rank."""
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def find_leaks() -> list[str]:
    """Name the non-daemon threads and the child processes that still run.

    They get half a second to end by themselves; with nothing running the check takes microseconds.

    Blind to: daemon threads, processes that detached themselves, and torch's and multiprocessing's own service
    processes (resource tracker, fork server, inductor's compile workers).
    """
    deadline_s = time.monotonic() + _LEAK_GRACE_S
    while leaks := _running_threads() + _running_children():
        if time.monotonic() > deadline_s:
            return leaks
        gc.collect()
        time.sleep(0.02)
    return []


def _running_threads() -> list[str]:
    threads = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
    return [f"non-daemon thread {thread.name!r} is still running" for thread in threads]


def _running_children() -> list[str]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []  # no child at all: the usual case, and a cheap one
    children = [(pid, _command_line(pid)) for pid in _children_of(os.getpid())]
    return [f"child process {pid} is still running: {line}" for pid, line in children if not _is_service(line)]


def _children_of(parent: int) -> list[int]:
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent_pid = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # ended while we looked
        if int(parent_pid) == parent and state not in "ZX":
            children.append(int(entry.parent.name))
    return children


def _command_line(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:200]


def _is_service(command_line: str) -> bool:
    services = ("multiprocessing.resource_tracker", "multiprocessing.forkserver", "compile_worker")
    return any(service in command_line for service in services)
