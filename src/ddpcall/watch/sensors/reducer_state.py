"""The state of one DDP's reducer: whether it is armed, which gradients came while it was not, and from whom.

The signal that decides is a gradient's arrival while the reducer is not armed. Which attribute was called only
serves to name the line. An armed arrival clears earlier unarmed ones of the same parameter: the reducer averages
the accumulated gradient.

A hook for every parameter is dear, so there is none until a backward begins that the reducer was not armed for;
from then on they stay. Of an armed backward the reducer itself tells whether it reduced: it notes when gradients
came.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpcall import torch_internals as internals
from ddpcall.taps import (
    NOWHERE,
    CallSite,
    Undo,
    find_call_site,
    find_tensors,
    hook_arrival,
    is_installed_file,
    is_lazy,
    outside_dynamo,
    site_of,
)
from ddpcall.watch.advice import NO_NAMES, Names, hands_over, read_names
from ddpcall.watch.sensors.collectives import Mark

MAX_ENTRIES = 256


class Cause(StrEnum):
    """What left gradients unreduced."""

    BYPASSED = "bypassed"
    """A forward outside the wrapper's: its gradients arrived while the reducer was not armed."""
    RAW_WEIGHTS = "raw_weights"
    """The same, without any forward: the weights were used directly."""
    IN_FORWARD = "in_forward"
    """A backward that the model ran inside the wrapper's forward."""
    SYNC_OFF = "sync_off"
    """A wrapper's forward under `no_sync()`, and no reduction since."""
    CONSUMED = "consumed"
    """An earlier backward had used up the reducer's one reduction."""
    AUTOGRAD_GRAD = "autograd_grad"
    """`torch.autograd.grad`, which no reducer sees."""


@dataclass(eq=False)
class Entry:
    """A grad-enabled forward into the model that no armed wrapper stood around.

    Attributes:
        site: The user's line that entered.
        sync_off: The line that had switched synchronization off; None when the wrapper was not gone through.
        linked: Whether its outputs were found, so that `reached` tells whether a backward went through them.
        reached: The backward (by number) that last went through an output.
        is_taken: Whether `torch.autograd.grad` went through an output; a backward of what it returned does not.
        names: What the line can call the model.
    """

    site: CallSite
    sync_off: CallSite | None = None
    linked: bool = False
    reached: int = 0
    is_taken: bool = False
    names: Names = NO_NAMES


@dataclass(eq=False)
class Unreduced:
    """What left gradients unreduced, in one backward.

    Attributes:
        cause: Why.
        site: The line to blame, or the backward's where none is known.
        others: Further lines.
        backward: The line that ran the backward.
        gradient: For `AUTOGRAD_GRAD`, address of the gradient that the parameter had before.
        versions: Versions of the gradients when they arrived, by parameter id: a later one was written to since.
        names: What the line at `site` can call the model.
    """

    cause: Cause
    site: CallSite
    others: tuple[CallSite, ...] = ()
    backward: CallSite = NOWHERE
    gradient: int = 0
    versions: dict[int, int] = field(default_factory=dict)
    names: Names = NO_NAMES


@dataclass(eq=False)
class ReducerState:
    """What is known about one DDP.

    Attributes:
        name: The wrapped module's class, for messages.
        names: Parameter names by id, for the parameters that the reducer owns.
        ddp: Returns the DDP while it lives; it is held weakly.
        root: Returns the wrapped module while it lives.
        modules: The modules under the wrapper, by id.
        is_announced: Whether its reducer is still to be made (`replicate`).
        armed: Whether the reducer expects gradients.
        is_presumed: Whether that is only assumed, since the watch may have begun after a forward.
        in_use: Whether an optimizer stepped its parameters since the watch began, or it was wrapped since then.
        forwards: Grad-enabled forwards of the wrapper since the last optimizer step.
        forwarded: Whether there was any forward of the wrapper since then: the first one broadcasts the buffers.
        was_called: Whether there was any forward of the wrapper at all.
        num_reductions: Backwards that its reducer has reduced.
        wrapper: What the model was wrapped with, a key of `watched.WRAPPERS`.
        num_steps: Steps of an optimizer that has parameters of it.
        had_backward: Whether gradients ever came from a backward.
        dirty: Parameters, by id, whose last gradient arrived unarmed, with the backward it came from.
        owned: The parameters of `names`.
        sharing: States of other wrappers that own some of the same parameters.
        detached: Parameters, by id, that a conversion took away from the reducer, with its line.
        entries: Forwards outside an armed wrapper's since the last optimizer step.
        mark: Returns this moment in the log of collectives.
        unarmed_since: When the backward began in which a gradient first arrived unarmed since the last step: only
            what the script sends after that can be the reduction which it still needs. (A hook of the script's
            own may send each gradient as it comes, before ours is called.)
        switched_off: Where the script told `replicate` not to synchronize; its forward passes that on.
    """

    name: str
    names: dict[int, str]
    ddp: Callable[[], DistributedDataParallel | None] = lambda: None
    root: Callable[[], nn.Module | None] = lambda: None
    modules: dict[int, weakref.ref[nn.Module]] = field(default_factory=dict)
    is_announced: bool = False
    armed: bool = False
    is_presumed: bool = False
    in_use: bool = True
    forwards: int = 0
    forwarded: bool = False
    was_called: bool = False
    num_reductions: int = 0
    wrapper: str = "ddp"
    num_steps: int = 0
    had_backward: bool = False
    dirty: dict[int, Unreduced] = field(default_factory=dict)
    sharing: list[ReducerState] = field(default_factory=list)
    detached: dict[int, CallSite] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    switched_off: CallSite | None = None
    sync_off: CallSite | None = None
    sync_off_forwards: int = 0
    sync_off_reduced: int = 0
    backward: int = 0
    owned: list[weakref.ref[nn.Parameter]] = field(default_factory=list)
    _untapped: list[weakref.ref[nn.Parameter]] | None = None
    _is_taking: bool = False
    _stats: list[int] = field(default_factory=list)
    _task: int = -1
    _unarmed: list[int] = field(default_factory=list)
    _site: CallSite = NOWHERE
    _is_in_forward: bool = False
    _entered: dict[tuple[CallSite, CallSite | None], tuple[CallSite, Names]] = field(default_factory=dict)
    mark: Callable[[], Mark] = Mark
    unarmed_since: Mark | None = None
    _versions: dict[int, int] = field(default_factory=dict)
    undo: list[Undo] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the callbacks that the autograd engine runs."""
        self._arrive_eagerly = outside_dynamo(self.arrive)
        self._note_reached = outside_dynamo(self._reach)
        self._settle_later = outside_dynamo(self._settle)

    def own(self, root: nn.Module, parameters: list[nn.Parameter], mark: Callable[[], Mark]) -> None:
        """Take the module inside the wrapper, what the reducer owns of it, and what marks a moment."""
        self.root, self.mark = weakref.ref(root), mark
        self.owned = [weakref.ref(parameter) for parameter in parameters]

    def share_with(self, newer: ReducerState) -> None:
        """Note a newer wrapper of some of the same parameters; both may be used in turn, if it has them all."""
        alive = {id(p) for reference in self.owned if (p := reference()) is not None}
        if not alive & newer.names.keys():
            return
        newer.sharing.append(self)
        if alive <= newer.names.keys():
            self.close()
            self.armed = False
        else:
            self.sharing.append(newer)

    def add_modules(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """Count modules as parts of the wrapped model; return those that are new."""
        new = [module for module in modules if id(module) not in self.modules]
        self.modules.update((id(module), weakref.ref(module)) for module in new)
        return new

    def use(self) -> bool:
        """Note that an optimizer steps it; say whether that is news."""
        is_news, self.in_use = not self.in_use, True
        return is_news

    def count_step(self, number: int) -> None:
        """Note the steps of an optimizer that has parameters of it; of several the one with most counts."""
        for each in (self, *self.sharing):
            each.num_steps = max(each.num_steps, number)

    def parameters(self) -> list[nn.Parameter]:
        """Return what the reducer owns, as it is now."""
        ddp = self.ddp()
        return [] if ddp is None else [p for p in internals.MODULE_PARAMETERS.of(ddp) if id(p) in self.names]

    def contains(self, candidate: Any) -> bool:
        """Say whether an object is one of the wrapped module's modules (not the wrapper itself)."""
        reference = self.modules.get(id(candidate))
        return reference is not None and reference() is candidate

    def arm(self, reducer: Any) -> None:
        """Note that the reducer was prepared: it averages the next backward, whatever led here."""
        self.armed, self.is_presumed = True, False
        self._stats = reducer.get_backward_stats()

    def presume(self, reducer: Any) -> None:
        """Take over a reducer that may be prepared already, of a model that may have been trained."""
        self.arm(reducer)
        self.is_presumed = self.was_called = self.had_backward = True
        self.in_use = False

    def is_replicate(self) -> bool:
        """Say whether the model is called itself, and a hook of its own does what a wrapper does."""
        return isinstance(self.root(), internals.REPLICATED_MODULE.get(()))

    def is_in_forward(self) -> bool:
        """Say whether the wrapper's forward is running."""
        ddp = self.ddp()
        return ddp is not None and internals.ACTIVE_DDP_MODULE.of(DistributedDataParallel) is ddp

    def bind(self, ddp: Callable[[], DistributedDataParallel | None]) -> None:
        """Take whose reducer it is."""
        self.ddp = ddp

    def come_true(self) -> bool:
        """Note that the reducer was made; say whether it was announced."""
        was_announced, self.is_announced = self.is_announced, False
        return was_announced

    def announce_switch(self, site: CallSite | None) -> None:
        """Note where `replicate` was told not to synchronize; None where it is to synchronize again."""
        self.switched_off = site

    def switch_off(self, site: CallSite) -> None:
        """Note that synchronization is switched off."""
        if self.sync_off is None:
            self.sync_off_forwards = self.sync_off_reduced = 0
        # `replicate` hands its own switch on in its forward: the line that turned that is the one to blame.
        self.sync_off = self.switched_off or site

    def switch_on(self) -> CallSite | None:
        """Note that it is switched on again; return where it was switched off, if that had no effect at all."""
        self.switched_off = None
        off, self.sync_off = self.sync_off, None
        return off if self.sync_off_reduced and not self.sync_off_forwards else None

    def read_names(self, entry: Entry, line: FrameType | None, caller: FrameType | None) -> None:
        """Read what the line of an entry can call the model: once a line, since it takes a while.

        Where the line is a library's, which only calls what the user's line handed to it, the user's is blamed.
        """
        root, key = self.root(), (entry.site, entry.site.called_from)
        if line is None or root is None:
            return
        if key not in self._entered:
            wrapper = root if self.is_replicate() else self.ddp()
            site, names = entry.site, read_names(line, wrapper, root)
            if caller is not None and is_installed_file(site.file):
                theirs = replace(read_names(caller, wrapper, root), is_caller=True)
                site, names = (site_of(caller), theirs) if hands_over(theirs) else (site, names)
            self._entered[key] = site, names
        entry.site, entry.names = self._entered[key]

    def passed(self, outputs: Any) -> None:
        """Note that the wrapper's forward ended; its reducer was prepared unless synchronization is off."""
        ddp = self.ddp()
        self.forwarded = self.was_called = True
        if ddp is None or not torch.is_grad_enabled():
            return
        self.forwards += 1
        if ddp.require_backward_grad_sync:
            return
        self.sync_off_forwards += 1
        self.enter(Entry(find_call_site(), self.sync_off or NOWHERE), outputs)

    def enter(self, entry: Entry, outputs: Any) -> None:
        """Note an entry and link it to the backward of its outputs."""
        found = find_tensors(outputs)
        tensors = [tensor for tensor in found if tensor.grad_fn is not None]
        if found and not tensors:
            return
        for tensor in tensors[:8]:
            node: Any = tensor.grad_fn
            node.register_prehook(partial(self._note_reached, entry))
        entry.linked = bool(tensors)
        self.entries.append(entry)
        del self.entries[:-MAX_ENTRIES]

    def _reach(self, entry: Entry, gradients: Any) -> None:
        self._begin_backward()
        entry.reached = self.backward
        entry.is_taken = entry.is_taken or self._is_taking

    def _begin_backward(self) -> None:
        task = internals.graph_task()
        if task != self._task:
            self._task = task
            self.backward += 1

    def is_unprepared(self) -> bool:
        """Say whether nobody has prepared the reducer, and not only for want of synchronization, as told."""
        is_told = bool(self.entries) and all(entry.sync_off for entry in self.entries)
        return not (self.armed or self.is_presumed or is_told)

    def begin_backward(self) -> None:
        """Prepare for a backward that is about to run, perhaps through this model."""
        if self.armed and not self.dirty and not self.is_presumed:
            return
        if not self.dirty:
            self.unarmed_since = self.mark()
        if self._untapped is None:
            self._untapped = list(self.owned)
        if self._untapped:
            self._untapped = [reference for reference in self._untapped if not self._tap(reference)]

    def _tap(self, reference: weakref.ref[nn.Parameter]) -> bool:
        """Put a hook on a parameter; false for one that is frozen now, as a discriminator is in its turn."""
        parameter = reference()
        if parameter is None:
            return True
        if parameter.requires_grad:
            self.undo.append(hook_arrival(parameter, self._arrive_eagerly))
        return parameter.requires_grad

    def take(self, parameter: Tensor, site: CallSite) -> None:
        """Note that `torch.autograd.grad` handed out a parameter's gradient, unless it is to blame already."""
        blame = Unreduced(Cause.AUTOGRAD_GRAD, site, gradient=address_of(parameter.grad))
        self.dirty.setdefault(id(parameter), blame)

    def detach(self, parameter: Tensor, site: CallSite) -> None:
        """Note that a conversion took a parameter away from the reducer."""
        self.detached.setdefault(id(parameter), site)

    def begin_taking(self) -> None:
        """Note that `torch.autograd.grad` begins: no gradient arrives anywhere."""
        self._is_taking = True

    def end_taking(self) -> None:
        """Note that `torch.autograd.grad` ended."""
        self._is_taking = False

    def end_backward(self) -> None:
        """Note what an armed reducer did in the backward that ended."""
        if self.is_presumed:
            self._end_presumption()
        elif self.armed:
            self.had_backward = True
            if self._has_reduced():
                self._disarm()

    def _end_presumption(self) -> None:
        """Now it is known whether the reducer was prepared when the watch began, if any gradient came.

        Of gradients that it did not reduce, nobody is blamed but a forward that was seen: another may have come
        before the watch began.
        """
        if self._has_reduced():
            self.is_presumed = False
            self._disarm()
        elif self._unarmed:
            self.is_presumed = self.armed = False
            if any(entry.reached == self.backward for entry in self.entries):
                self._settle()
        self._unarmed, self._versions = [], {}

    def _has_reduced(self) -> bool:
        """Say whether gradients came to the reducer since it was armed, or since this was last asked.

        Source: `Reducer::mark_variable_ready` in torch/csrc/distributed/c10d/reducer.cpp, which writes these
        times; in a static graph's first iteration it does not.
        """
        ddp = self.ddp()
        before, self._stats = self._stats, [] if ddp is None else ddp.reducer.get_backward_stats()
        return self._stats != before

    def is_armed_for(self, key: int) -> bool:
        """Say whether a gradient that arrives is averaged, of a parameter by id."""
        if self.armed and not self.is_presumed:
            return True
        return bool(self.sharing) and any(other.armed and key in other.names for other in self.sharing)

    def reduces(self, key: int) -> bool:
        """Say whether a gradient that is being computed will arrive, and be averaged."""
        return not self._is_taking and key not in self.detached and self.is_armed_for(key)

    def arrive(self, parameter: Tensor) -> None:
        """Note one gradient: the hook on every parameter the reducer owns."""
        key = id(parameter)
        if self.is_armed_for(key):
            self.dirty.pop(key, None)
            return
        self._begin_backward()
        self.had_backward = True
        if not self._unarmed:
            self._site = find_call_site()
            self._is_in_forward = self.is_in_forward()
            if not self.is_presumed:
                internals.EXECUTION_ENGINE.get().queue_callback(self._settle_later)
        self._unarmed.append(key)
        if parameter.grad is not None:
            self._versions[key] = internals.TENSOR_VERSION.of(parameter.grad)

    def _disarm(self) -> None:
        self.num_reductions += 1
        ddp = self.ddp()
        if self.sync_off is not None:
            self.sync_off_reduced += 1
        # In a static graph's first iteration the reducer does not say whether it is done; the step ends it.
        if ddp is None or not ddp.static_graph:
            self.armed = ddp is not None and not is_finalized(ddp)

    def _settle(self) -> None:
        """Blame somebody for the gradients that arrived unarmed in the backward that ends now."""
        blame = self._blame()
        self.dirty.update(dict.fromkeys(self._unarmed, blame))
        blame.versions, self._versions = self._versions, {}
        self._unarmed = []

    def _blame(self) -> Unreduced:
        if self._is_in_forward:
            return Unreduced(Cause.IN_FORWARD, self._site, (), self._site)
        reached = [entry for entry in self.entries if entry.reached == self.backward]
        reached = reached or [entry for entry in self.entries if entry.is_taken or not entry.linked]
        bypasses = [entry for entry in reached if entry.sync_off is None]
        if bypasses:
            sites = tuple(dict.fromkeys(entry.site for entry in bypasses))
            return Unreduced(Cause.BYPASSED, sites[0], sites[1:], self._site, names=bypasses[0].names)
        if reached:
            off, site = reached[-1].sync_off or NOWHERE, reached[-1].site
            return Unreduced(Cause.SYNC_OFF, off if off != NOWHERE else site, (site,), self._site)
        if self.forwards:
            return Unreduced(Cause.CONSUMED, self._site, (), self._site)
        return Unreduced(Cause.RAW_WEIGHTS, self._site, (), self._site)

    def end_step(self) -> None:
        """Forget what an optimizer step has used up."""
        self.dirty.clear()
        self.unarmed_since = None
        self.entries.clear()
        self.forwards = 0
        self.forwarded = False
        ddp = self.ddp()
        if ddp is not None and ddp.static_graph:
            self.armed = False

    def close(self) -> None:
        """Take the hooks off the parameters; there will be none again."""
        self._untapped = []
        while self.undo:
            self.undo.pop()()


def is_finalized(ddp: DistributedDataParallel) -> bool:
    """Say whether the reducer has reduced everything it began: false in between two partial backwards."""
    try:
        internals.CHECK_REDUCER_FINALIZED.of(ddp.reducer)()
    except RuntimeError:
        return False
    return True


def owned_parameters(ddp: DistributedDataParallel, earlier: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) for what the reducer owns: trainable when wrapped, and not ignored.

    Args:
        ddp: The wrapper.
        earlier: Whether parameters may have been frozen or unfrozen since it was made.
    """
    names = {id(parameter): name for name, parameter in ddp.module.named_parameters()}
    parameters: list[Any] = list(internals.MODULE_PARAMETERS.of(ddp))
    owned = [p for p in parameters if p.requires_grad and not is_lazy(p)]
    if earlier and not len(parameters) == len(owned) == len(ddp.reducer.get_backward_stats()):
        # The reducer itself knows, but its answer takes the memory of all its gradients for a moment.
        buckets = internals.GRAD_BUCKETS.of(ddp.reducer)()
        owned = [parameter for bucket in buckets for parameter in bucket.parameters()]
    for parameter in owned:
        yield names.get(id(parameter), "?"), parameter


def nonzero(gradients: Iterable[Tensor | None]) -> bool:
    """Say whether any gradient is there and not zero throughout."""
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)


def address_of(tensor: Tensor | None) -> int:
    """Return where a tensor's storage lies; 0 for none."""
    return 0 if tensor is None else tensor.untyped_storage().data_ptr()
