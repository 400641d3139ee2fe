"""Places: where a parameter's own and used gradients can be seen, and which part of the whole a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ddpcall.replicas import digest_tensor
from ddpcall.sketch import sketch
from ddpcall.taps import Undo, is_lazy

See = Callable[[bool, Tensor], None]
"""Called with a gradient, and whether it was seen ahead of the parameter's other tensor hooks."""

SHARDED = ("Shard", "_StridedShard")
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Place:
    """One parameter as the model computes with it and as an optimizer steps it.

    Attributes:
        name: Its name in the model.
        stepped: What the optimizer holds: the parameter itself, its shard, or a copy.
        numel: Elements of the whole.
        is_foreign: The optimizer holds a copy.
    """

    def __init__(self, name: str, computed: Tensor, stepped: Tensor | None = None) -> None:
        self.name = name
        self.stepped = computed if stepped is None else stepped
        self.is_foreign = stepped is not None
        self.numel = computed.numel()
        self.dtype = str(computed.dtype).removeprefix("torch.")
        self._computed = computed
        self._hooks: list[Any] = []
        self._see: See | None = None
        self._accumulator: Any = None

    def hook(self, see: See) -> Undo:
        """Hear of own gradients."""
        self._see = see
        self._put_hooks()
        return self._remove_hooks

    def rehook(self) -> None:
        """Be first and last again where other hooks have come."""
        others = self._other_hooks()
        if self._see is not None and len(self._hooks) != (2 if others else 1):
            self._remove_hooks()
            self._put_hooks()

    def _put_hooks(self) -> None:
        see = self._see
        assert see is not None
        others = self._other_hooks()
        self._hooks = [self._computed.register_hook(lambda gradient: see(False, gradient))]
        if others:
            self._hooks.append(self._computed.register_hook(lambda gradient: see(True, gradient)))
            hooks: Any = self._computed._backward_hooks
            # Autograd walks the dict itself, in the order of insertion: moving to the front is not enough.
            ordered = list(hooks.items())
            hooks.clear()
            hooks.update([ordered[-1], *ordered[:-1]])

    def _other_hooks(self) -> int:
        return len(self._computed._backward_hooks or ()) - len(self._hooks)

    def _remove_hooks(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def is_captured(self) -> bool:
        """Say whether `torch.autograd.grad` asked for the gradient that is being seen."""
        if self._accumulator is None:
            self._accumulator = torch.autograd.graph.get_gradient_edge(self._computed).node
        try:
            return not torch._C._will_engine_execute_node(self._accumulator)  # pyright: ignore
        except RuntimeError:  # what torch says of a leaf under autograd.grad
            return True

    def sketch_own(self, gradient: Tensor) -> Tensor:
        return sketch(gradient, self.name)

    def sketch_used(self, gradient: Tensor) -> Tensor:
        return sketch(gradient, self.name)

    def sketch_carry(self) -> Tensor | None:
        """Sketch what already lies where the coming gradient will be added."""
        gradient = self._computed.grad
        return None if gradient is None else self.sketch_used(gradient)

    def used_parts(self, gradient: Tensor) -> tuple[int, ...]:
        """Return the ranks whose parts of the used gradient make up the whole."""
        return ranks_along(gradient, (*SHARDED, "Partial"))

    def digest(self) -> int:
        """Return the digest of the weights that lie here."""
        values: Any = self.stepped.detach()
        return digest_tensor(values.to_local() if hasattr(values, "placements") else values)


def ranks_along(tensor: Any, kinds: Sequence[str] | None) -> tuple[int, ...]:
    """Return the ranks along a DTensor's mesh dims whose placement is of one of the kinds; all dims for None.

    Empty for other tensors: a rank has all of them.
    """
    if not hasattr(tensor, "placements"):
        return ()
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    index = tuple(
        slice(None) if kinds is None or type(placement).__name__.endswith(tuple(kinds)) else place
        for placement, place in zip(tensor.placements, coordinate, strict=True)
    )
    return tuple(mesh.mesh[index].flatten().tolist())


def find_places(model: nn.Module, optimizers: Sequence[Optimizer]) -> list[Place]:
    """Return the model's parameters that the optimizers hold.

    Raises:
        ValueError: there is none, and they are no copies either.
    """
    stepped = [
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    held = {id(parameter) for parameter in stepped}
    named = {_clean(name): p for name, p in model.named_parameters() if p.requires_grad and not is_lazy(p)}
    places = [Place(name, parameter) for name, parameter in named.items() if id(parameter) in held]
    if places:
        return places
    if named and [p.shape for p in stepped] == [p.shape for p in named.values()]:
        return [Place(name, own, copy) for (name, own), copy in zip(named.items(), stepped, strict=True)]
    raise ValueError(
        "the optimizer holds none of the model's parameters, so its steps do not train this model. Make the "
        "optimizer from the model that you train, after it was wrapped or moved: "
        "optimizer = torch.optim.AdamW(model.parameters())"
    )


def _clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
