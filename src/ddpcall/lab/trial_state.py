"""What a trial needs to go on where it was: parameters, buffers, optimizer and random numbers of one rank."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpcall.accelerator import CPU, get_rng_state, set_rng_state
from ddpcall.shards import local_part
from ddpcall.taps import is_lazy
from ddpcall.wrappers import WRAPPERS


def is_resumable(wrapper: str, model: nn.Module) -> bool:
    """Say whether a trial can go on in mid-run to the same bits; if not, it begins anew."""
    return WRAPPERS[wrapper].resumable and not any(map(is_lazy, model.parameters()))


def take_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return this rank's parameters, buffers and what the optimizer keeps of them, by name."""
    tensors = {name: local_part(tensor.detach()) for name, tensor in _named_tensors(model)}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items() if torch.is_tensor(value)}
    return tensors


def put_tensors(
    model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """Put back what `take_tensors` and `take_settings` returned.

    Raises:
        ValueError: They belong to another model.
    """
    own = dict(_named_tensors(model))
    saved = {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer/")}
    if {name: local_part(tensor).shape for name, tensor in own.items()} != {n: t.shape for n, t in saved.items()}:
        raise ValueError("parameters and buffers have other names or shapes than this model's")
    with torch.no_grad():
        for name, tensor in own.items():
            local_part(tensor).copy_(saved[name])
    state: dict[int, dict[str, Any]] = {index: dict(values) for index, values in settings["numbers"].items()}
    for path, tensor in tensors.items():
        if path not in saved:
            _, index, name = path.split("/")
            state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": settings["groups"]})


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield f"parameters/{name}", parameter
    for name, buffer in model.named_buffers():
        yield f"buffers/{name}", buffer


def take_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Return what the optimizer keeps beside tensors."""
    state = optimizer.state_dict()
    numbers = {
        index: {name: value for name, value in values.items() if not torch.is_tensor(value)}
        for index, values in state["state"].items()
    }
    return {"groups": state["param_groups"], "numbers": numbers}


def take_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators of torch, Python and NumPy."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "device": None if device.type == CPU else get_rng_state(device),
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), *map(float, rest)),
    }


def put_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `take_random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["device"] is not None:
        set_rng_state(state["device"], device)
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
