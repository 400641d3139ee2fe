"""Places: where a parameter's own and used gradients can be seen, and which part of the whole a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddpcall import torch_internals as internals
from ddpcall.replicas import digest_tensor
from ddpcall.sketch import sketch
from ddpcall.taps import Undo

See = Callable[[bool, Tensor], None]
"""Called with a gradient, and whether it was seen ahead of the parameter's other tensor hooks."""

SHARDED = ("Shard", "_StridedShard")
_SAMPLED = 1024
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Place:
    """One parameter as the model computes with it and as an optimizer steps it.

    Attributes:
        name: Its name in the model.
        stepped: What the optimizer holds: the parameter itself, its shard, or a copy.
        numel: Elements of the whole.
        is_foreign: The optimizer holds a copy.
        dtype: That of the parameter.
        sketch: Makes the sketches; who watches many small parameters has them made together.
    """

    def __init__(self, name: str, computed: Tensor, stepped: Tensor | None = None) -> None:
        self.name = name
        self.stepped = computed if stepped is None else stepped
        self.is_foreign = stepped is not None
        self.numel = computed.numel()
        self.dtype = str(computed.dtype).removeprefix("torch.")
        self.sketch: Callable[..., Tensor] = sketch
        self._computed = computed
        self._hooks: list[Any] = []
        self._had_no_hooks = False
        self._see: See | None = None
        self._accumulator: Any = None

    def whole(self) -> Tensor | None:
        """Return the leaf whose gradient autograd computes; None while there is none."""
        return self._computed

    def hook(self, see: See) -> Undo:
        """Hear of own gradients."""
        self._see = see
        self._put_hooks()
        return self._remove_hooks

    def rehook(self) -> None:
        """Be first and last again where other hooks have come."""
        if self._see is not None and self._hooks and len(self._hooks) != (2 if self._other_hooks() else 1):
            self._remove_hooks()
            self._put_hooks()

    def _put_hooks(self) -> None:
        see, leaf = self._see, self.whole()
        assert see is not None
        assert leaf is not None
        others = self._other_hooks()
        self._had_no_hooks = internals.TENSOR_BACKWARD_HOOKS.of(leaf, None) is None
        self._hooks = [leaf.register_hook(partial(see, False))]
        if others:
            self._hooks.append(leaf.register_hook(partial(see, True)))
            hooks = internals.TENSOR_BACKWARD_HOOKS.of(leaf)
            # Autograd walks the dict itself, in the order of insertion: moving to the front is not enough.
            ordered = list(hooks.items())
            hooks.clear()
            hooks.update([ordered[-1], *ordered[:-1]])

    def _other_hooks(self) -> int:
        return len(internals.TENSOR_BACKWARD_HOOKS.of(self.whole(), None) or ()) - len(self._hooks)

    def _remove_hooks(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        leaf = self.whole()
        if self._had_no_hooks and leaf is not None and internals.TENSOR_BACKWARD_HOOKS.of(leaf, None) == {}:
            # Else every backward goes into Python for a dict that is empty: 1 us a parameter.
            setattr(leaf, internals.TENSOR_BACKWARD_HOOKS.name, None)
            self._had_no_hooks = False

    def is_captured(self) -> bool:
        """Say whether `torch.autograd.grad` asked for the gradient that is being seen."""
        leaf = self.whole()
        if self._accumulator is None and leaf is not None:
            self._accumulator = torch.autograd.graph.get_gradient_edge(leaf).node
        try:
            return not internals.WILL_ENGINE_EXECUTE_NODE.get()(self._accumulator)
        except RuntimeError:  # what torch says of a leaf under autograd.grad
            return True

    def sketch_own(self, gradient: Tensor) -> Tensor:
        """Sketch what autograd computed."""
        return self.sketch(gradient, self.name)

    def used_gradient(self) -> Tensor | None:
        """Return the part of the used gradient that lies here."""
        return self.stepped.grad

    def sketch_used(self, gradient: Tensor) -> Tensor:
        """Sketch a used gradient, or what is accumulated into one."""
        return self.sketch(gradient, self.name)

    def sketch_carry(self) -> Tensor | None:
        """Sketch what already lies where the coming gradient will be added."""
        leaf = self.whole()
        return None if leaf is None or leaf.grad is None else self.sketch_used(leaf.grad)

    def sketch_pending(self) -> Tensor | None:
        """Sketch what earlier backwards left behind that is not reduced yet."""
        return None

    def reduced_in(self, gradient: Tensor) -> str:
        """Return the type in which the used gradient was reduced, as far as it can be told; else nothing."""
        return find_precision(gradient)

    def used_parts(self, gradient: Tensor | None) -> tuple[int, ...]:
        """Return the ranks whose parts of the used gradient make up the whole; none if it is here."""
        return ranks_along(gradient, (*SHARDED, "Partial"))

    def weight_parts(self) -> tuple[int, ...]:
        """Return the ranks that hold shards of the parameter."""
        return ranks_along(self.stepped, SHARDED)

    def digest(self) -> int:
        """Return the digest of the weights that lie here."""
        values: Any = self.stepped.detach()
        return digest_tensor(values.to_local() if hasattr(values, "placements") else values)


def find_precision(gradient: Any) -> str:
    """Return the 16-bit type that all of a sample of float32 values fit into exactly; empty if there is none.

    A communication hook that reduces in 16 bits leaves such values. Of others one in 65,536 is like that.
    """
    values = gradient.to_local() if hasattr(gradient, "placements") else gradient
    if values.dtype is not torch.float32 or values.layout is not torch.strided or values.is_meta:
        return ""
    flat = values.detach().reshape(-1) if values.is_contiguous() else values.detach()[:1].reshape(-1)
    sample = flat if flat.numel() <= _SAMPLED else flat[:: flat.numel() // _SAMPLED]
    # Most end here: neither type keeps any of the last 13 bits.
    if bool(sample.view(torch.int32).bitwise_and(0x1FFF).any()) or int(torch.count_nonzero(sample)) < 2:
        return ""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(sample, sample.to(dtype).to(torch.float32)):
            return str(dtype).removeprefix("torch.")
    return ""


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


def clean_name(name: str) -> str:
    """Return a parameter's name without the wrappers that keep the module's own names."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
