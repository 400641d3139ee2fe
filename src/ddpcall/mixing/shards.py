"""Places in sharded models: fully_shard computes with whole parameters, FSDP1 with whole flat ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.mixing.places import Place, See, clean_name
from ddpcall.replicas import digest_tensor
from ddpcall.sketch import sketch
from ddpcall.taps import Undo, is_lazy, replace_attribute


def _of(flat: Any, name: str) -> Any:
    """Return what a flat parameter of FSDP1 keeps under this name."""
    return internals.FLAT_PARAMETER[name].of(flat)


class ShardedPlace(Place):
    """A parameter of fully_shard: its own gradient is seen on the whole parameter, the used one on the shard.

    Not where gradients enter the reduction: a micro-batch without synchronization never gets there in its step.
    """

    def __init__(self, name: str, shard: Any) -> None:
        super().__init__(name, shard.sharded_param)
        self._shard = shard

    def whole(self) -> Tensor | None:
        return internals.FSDP_UNSHARDED_PARAM.of(self._shard, None)

    def hook(self, see: See) -> Undo:
        self._see = see
        if self.whole() is not None:
            self._put_hooks()
            return self._remove_hooks
        original = self._shard.init_unsharded_param

        def init_unsharded_param() -> None:
            original()
            if not self._hooks:
                self._put_hooks()

        undo = replace_attribute(self._shard, "init_unsharded_param", init_unsharded_param)

        def undo_both() -> None:
            undo()
            self._remove_hooks()

        return undo_both

    def sketch_carry(self) -> Tensor | None:
        gradient = self.stepped.grad
        return None if gradient is None else self.sketch(gradient, self.name)

    def sketch_pending(self) -> Tensor | None:
        """Sketch what earlier backwards left on the whole parameter, unreduced."""
        gradients = [getattr(self.whole(), "grad", None), getattr(self._shard, "unsharded_accumulated_grad", None)]
        found = [sketch(gradient, self.name) for gradient in gradients if gradient is not None]
        return sum(found[1:], found[0]) if found else None

    def reduced_in(self, gradient: Tensor) -> str:
        known = getattr(self._shard, "reduce_dtype", None)  # set in the first forward
        return str(known).removeprefix("torch.") if known else super().reduced_in(gradient)


class FlatPlace(Place):
    """A parameter in a flat one of FSDP1."""

    def __init__(self, name: str, index: int, handle: Any, group: Any, tap: FlatTap) -> None:
        flat = handle.flat_param
        self._keeps_originals = internals.FLAT_HANDLE["use_orig_params"].of(handle)
        super().__init__(name, _of(flat, "params")[index] if self._keeps_originals else flat)
        self.numel = int(_of(flat, "numels")[index])
        self._index = index
        self._handle = handle
        self._tap = tap
        self._ranks = tuple(dist.get_process_group_ranks(group)) if handle.uses_sharded_strategy else ()

    def hook(self, see: See) -> Undo:
        return self._tap.add(self._handle, partial(self._see_flat, see))

    def rehook(self) -> None:
        pass

    def _see_flat(self, see: See, flat_gradient: Tensor) -> None:
        flat = self._handle.flat_param
        sizes, padding = _of(flat, "numels_with_padding"), _of(flat, "is_padding_mask")
        starts = [sum(sizes[:i]) for i in range(len(sizes)) if not padding[i]]
        first = starts[self._index]
        see(False, flat_gradient.reshape(-1)[first : first + self.numel])

    def is_captured(self) -> bool:
        return False

    def used_gradient(self) -> Tensor | None:
        gradient = self.stepped.grad
        if gradient is None or self._keeps_originals:
            return gradient
        return self._cut(gradient)

    def _cut(self, flat_shard: Tensor) -> Tensor | None:
        info = _of(self._handle.flat_param, "shard_param_infos")[self._index]
        if not info.in_shard:
            return None
        return flat_shard.reshape(-1)[info.offset_in_shard : info.offset_in_shard + info.numel_in_shard]

    def sketch_used(self, gradient: Tensor) -> Tensor:
        info = _of(self._handle.flat_param, "shard_param_infos")[self._index]
        return self.sketch(
            gradient.reshape(-1), self.name, start=info.intra_param_start_idx if info.in_shard else 0
        )

    def sketch_carry(self) -> Tensor | None:
        flat = self._handle.flat_param
        saved = (
            internals.FLAT_PARAMETER["saved_grad_shard"].of(flat, None)
            if self._handle.uses_sharded_strategy
            else None
        )
        shard = None if saved is None else self._cut(saved)
        return None if shard is None else self.sketch_used(shard)

    def reduced_in(self, gradient: Tensor) -> str:
        known = internals.FLAT_HANDLE["reduce_dtype"].of(self._handle)
        return str(known).removeprefix("torch.") if known else super().reduced_in(gradient)

    def used_parts(self, gradient: Tensor | None) -> tuple[int, ...]:
        return self._ranks

    def weight_parts(self) -> tuple[int, ...]:
        return self._ranks

    def digest(self) -> int:
        values = self.stepped.detach()
        part = values if self._keeps_originals else self._cut(values)
        return 0 if part is None else digest_tensor(part)


class FlatTap:
    """Hears of every flat gradient that enters FSDP1's reduction."""

    def __init__(self) -> None:
        self._listeners: dict[int, list[Any]] = {}
        self._undos: list[Undo] = []

    def add(self, handle: Any, listener: Any) -> Undo:
        if not self._undos:
            for entry in internals.FLAT_REDUCTIONS.values():
                wrapper = partial(self._reduce, entry.get())
                self._undos.append(replace_attribute(entry.owner(), entry.name, wrapper))
        self._listeners.setdefault(id(handle), []).append(listener)
        return partial(self._remove, id(handle), listener)

    def _remove(self, key: int, listener: Any) -> None:
        self._listeners[key].remove(listener)
        if not any(self._listeners.values()):
            while self._undos:
                undo = self._undos.pop()
                undo()

    def _reduce(self, original: Any, state: Any, handle: Any) -> Any:
        gradient = handle.flat_param.grad
        for listener in self._listeners.get(id(handle), ()) if gradient is not None else ():
            listener(gradient)
        return original(state, handle)


def find_sharded(model: nn.Module) -> Iterator[tuple[list[int], Place]]:
    """Yield the places of sharded parameters, and the ids of the tensors that stand for them in the model."""
    tap = FlatTap()
    names = {id(module): name for name, module in model.named_modules()}
    for prefix, module in model.named_modules():
        for shard in _shards_of(module):
            info = internals.FSDP_MODULE_INFO.of(shard)
            # The module that holds it, which need not be the one that was sharded. Its own name comes later.
            owner = names.get(id(info.module), prefix)
            place = ShardedPlace(clean_name(f"{owner}.{info.param_name}".removeprefix(".")), shard)
            yield [id(shard.sharded_param), id(place.whole())], place
        handle, wrapped = (entry.of(module, None) for entry in internals.FSDP1.values())
        if handle is not None and wrapped is not None:
            yield from _flat_places(prefix, module, handle, tap)


def is_flattened(model: nn.Module) -> bool:
    """Say whether FSDP1 holds parameters of the model."""
    return any(internals.FSDP1["handle"].of(module, None) is not None for module in model.modules())


def _flat_places(prefix: str, module: Any, handle: Any, tap: FlatTap) -> Iterator[tuple[list[int], Place]]:
    for index, fqn in enumerate(_of(handle.flat_param, "fqns")):
        name = clean_name(f"{prefix}.{fqn}" if prefix else fqn)
        place = FlatPlace(name, index, handle, module.process_group, tap)
        yield [id(place.stepped)], place


def _shards_of(module: nn.Module) -> list[Any]:
    """Return fully_shard's parameters of one module. Before torch 2.13 a state has one group or none."""
    get_state = internals.GET_FSDP_STATE.of(module, None)
    if get_state is None:
        return []
    state = get_state()
    groups = internals.FSDP_PARAM_GROUPS.of(state, None) or [internals.FSDP_PARAM_GROUP.of(state)]
    return [shard for group in groups if group is not None for shard in group.fsdp_params]


def find_places(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Place]:
    """Return the model's parameters that the optimizers hold.

    Raises:
        ValueError: there is none, and they are no copies either.
    """
    stepped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    held = {id(parameter) for parameter in stepped}
    places: list[Place] = []
    standing_for: set[int] = set()
    for ids, place in find_sharded(model):
        standing_for.update(ids)
        if id(place.stepped) in held and place.stepped.requires_grad:
            places.append(place)
    named = {
        clean_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_lazy(parameter) and id(parameter) not in standing_for
    }
    places += [Place(name, parameter) for name, parameter in named.items() if id(parameter) in held]
    if places:
        return places
    if copied := find_copied(named, stepped):
        return copied
    raise ValueError(
        "the optimizer holds none of the model's parameters, so its steps do not train this model. Make the "
        "optimizer from the model that you train, after it was wrapped or moved: "
        "optimizer = torch.optim.AdamW(model.parameters())"
    )


def find_copied(named: Mapping[str, Tensor], held: Sequence[Tensor]) -> list[Place]:
    """Return the parameters that an optimizer may hold copies of; none unless it may have one of each.

    Shapes tell, in any order; of several values tell. Whether they are copies shows in the measured gradients.
    """
    left, places = dict(named), list[Place]()
    for copy in held if len(named) == len(held) else ():
        fitting = [name for name, own in left.items() if own.shape == copy.shape and own.device == copy.device]
        equal = (name for name in fitting if torch.equal(copy.detach().to(left[name].dtype), left[name].detach()))
        name = next(equal, fitting[0] if fitting else "")
        if not name:
            return []
        places.append(Place(name, left.pop(name), copy))
    return places
