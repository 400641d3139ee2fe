"""Devices and process-group backends: the only file that names cuda, nccl, xpu or xccl.

Another kind of device is one entry of `_BACKENDS`, where torch has a device module of that name (`torch.xpu`).
"""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CPU = "cpu"
CPU_BACKEND = "gloo"
# By type of device: the backend that sends its tensors between devices.
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}
DEVICE_TYPES = (CPU, *_BACKENDS)
BACKENDS = (CPU_BACKEND, *_BACKENDS.values())


@dataclass(frozen=True)
class Accelerator:
    """Where tensors live, and which backend sends them to other ranks."""

    device: torch.device
    backend: str


def choose_accelerator(device: str, backend: str, local_rank: int, local_world_size: int) -> Accelerator:
    """Choose device and backend for this rank.

    The CPU and gloo where there is no accelerator; the device's own backend with a device for every local rank;
    gloo where ranks share one.

    Raises:
        ValueError: A device or backend that is not there; the message has what to write.
    """
    here = find_device_type()
    if device not in ("auto", *DEVICE_TYPES) or backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"device={device} backend={backend}: write device=auto|{'|'.join(DEVICE_TYPES)} "
            f"and backend=auto|{'|'.join(BACKENDS)}"
        )
    kind = here if device == "auto" else device
    num_devices = count_devices(kind)
    if kind != CPU and not num_devices:
        raise ValueError(f"device={device}, but torch sees no GPU here. Write device=cpu")
    own_backend = _BACKENDS.get(kind, CPU_BACKEND)
    if backend not in ("auto", CPU_BACKEND, own_backend):
        needed = device_type_of(backend)
        raise ValueError(
            f"backend={backend} needs {needed.upper()} tensors, but the device is the {kind.upper()}. "
            f"Write backend={own_backend}"
        )
    if kind != CPU and backend == own_backend and num_devices < local_world_size:
        raise ValueError(
            f"backend={backend} needs a GPU for each of the {local_world_size} local ranks, and there are "
            f"{num_devices}. Write backend={CPU_BACKEND} to let ranks share a GPU"
        )
    if backend == "auto":
        backend = own_backend if num_devices >= local_world_size else CPU_BACKEND
    return Accelerator(torch.device(kind, local_rank % num_devices) if kind != CPU else torch.device(CPU), backend)


def find_device_type() -> str:
    """Return the type of this machine's accelerator; `cpu` where torch sees none."""
    return next((kind for kind in _BACKENDS if count_devices(kind)), CPU)


def count_devices(device_type: str) -> int:
    """Return how many devices of a type torch sees; 0 for the CPU."""
    module: Any = getattr(torch, device_type, None) if device_type in _BACKENDS else None
    return module.device_count() if module is not None and module.is_available() else 0


def device_type_of(backend: str) -> str:
    """Return the type of device whose tensors a backend sends; `cuda` too for `cpu:gloo,cuda:nccl`."""
    return next((kind for kind, name in _BACKENDS.items() if name in backend), CPU)


def explain_missing_devices(backend: str, world_size: int) -> str:
    """Say why `world_size` ranks of this machine cannot use a backend; empty if they can."""
    kind = device_type_of(backend)
    if kind == CPU:
        return ""
    name, found = _BACKENDS[kind], count_devices(kind)
    if found >= world_size and torch.distributed.is_backend_available(name):
        return ""
    return f"{world_size} ranks on {name} need {world_size} {kind.upper()} devices; this machine has {found}"


def device_ids(device: torch.device) -> list[torch.device] | None:
    """Return what DDP wants as `device_ids`: the one device, None on the CPU."""
    return None if device.type == CPU else [device]


def choose_device(backend: str, index: int) -> torch.device:
    """Return the device of the rank with this local index under a backend."""
    kind = device_type_of(backend)
    return torch.device(CPU) if kind == CPU else torch.device(kind, index)


def select_device(device: torch.device) -> None:
    """Make a device the current one of its type; nothing on the CPU."""
    if device.type != CPU:
        torch.get_device_module(device).set_device(device)


def reset_devices() -> None:
    """Make the first device current again, of each type that this process has used."""
    for kind in list_used_device_types():
        torch.get_device_module(kind).set_device(0)


def list_used_device_types() -> list[str]:
    """Return the types of accelerator that this process has initialized."""
    return [kind for kind in _BACKENDS if count_devices(kind) and torch.get_device_module(kind).is_initialized()]


def name_device(device: torch.device) -> str:
    """Return the device's name as its maker gives it; the machine's architecture for the CPU."""
    if device.type == CPU:
        return platform.machine()
    return torch.get_device_module(device).get_device_name(device)


def get_rng_state(device: torch.device | str) -> Tensor:
    """Return the state of a device's default generator."""
    kind = torch.device(device).type
    return torch.get_rng_state() if kind == CPU else torch.get_device_module(kind).get_rng_state(device)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Put back what `get_rng_state` returned."""
    if device.type == CPU:
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def fork_rng(device: torch.device | None = None) -> AbstractContextManager[None]:
    """Put the state of the CPU's and this device's generators back at the end; of all devices without one."""
    kind = find_device_type() if device is None else device.type
    if kind == CPU:
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng([device] if device is not None else range(count_devices(kind)), device_type=kind)


def is_capturing(tensor: Tensor) -> bool:
    """Say whether a CUDA graph is being captured on the tensor's device: its values must not be read then."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
