"""The watch's taps on torch, put on together and taken off together."""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddpcall import torch_internals as internals
from ddpcall.imports import after_import
from ddpcall.taps import NOWHERE, CallSite, Undo, outside_dynamo, strip_forward_taps
from ddpcall.watch.compare.mixing_watch import MixingWatch
from ddpcall.watch.compare.replica_watch import ReplicaWatch
from ddpcall.watch.events import Event
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.models import Models
from ddpcall.watch.output.streams import say
from ddpcall.watch.output.text import WatchError
from ddpcall.watch.output.watched import BY_HAND, Watched, WatchedModel
from ddpcall.watch.rules.averaging import AveragingWatch
from ddpcall.watch.rules.diagnose import diagnose
from ddpcall.watch.rules.steps import StepWatch
from ddpcall.watch.rules.suspects import Suspects
from ddpcall.watch.sensors.backwards import BackwardWatch
from ddpcall.watch.sensors.collectives import CollectiveLog
from ddpcall.watch.sensors.compiled import CompiledWatch
from ddpcall.watch.sensors.earlier import find_living
from ddpcall.watch.sensors.gradients import GradientSensor
from ddpcall.watch.sensors.hooks import HookWatch, can_be_tapped
from ddpcall.watch.sensors.last_sites import LastSites
from ddpcall.watch.sensors.parameters import ParameterWatch
from ddpcall.watch.sensors.precision import PrecisionWatch
from ddpcall.watch.sensors.saves import SAVERS, SaveWatch
from ddpcall.watch.sensors.sharded import FULLY_SHARD, ShardedWatch
from ddpcall.watch.sensors.stacks import STACKS, StackWatch
from ddpcall.watch.sensors.wrapping import WrapWatch
from ddpcall.watch.step_count import StepCount


class Attachment:
    """The taps of one watched run on this rank.

    Entry points are patched on their classes; modules under a wrapper get forward taps on the instance, parameters
    hooks when they are needed. All write in the same books: `Models` and `StepCount`.
    """

    def __init__(
        self,
        book: FindingsBook,
        *,
        missing: Callable[[str, Exception], None],
        every: int = 0,
        vitals_taken: Callable[[], None] = lambda: None,
    ) -> None:
        """Attach to torch; models are found as they are wrapped from now on.

        Args:
            book: Gets every finding, on the thread it happened on.
            missing: Gets what cannot be watched, in plain words, and why; also when a library is imported later.
            every: Ranks compare vitals every so many optimizer steps; 0 for never.
            vitals_taken: Is called at the steps after which vitals are taken.
        """

        def emit(event: Event) -> None:
            book.report(diagnose(event))

        self._book = book
        self._emit = emit
        self._missing = missing
        self._faults: list[str] = []
        self._adopted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._undo = ExitStack()
        guard, keep = outside_dynamo(self._guard), self.keep
        self._count = count = StepCount()
        self._collectives = CollectiveLog()
        self._models = models = Models(self._collectives.mark)
        suspects = Suspects(book)
        self._mixing = MixingWatch(
            count,
            self._collectives,
            book,
            lambda name: name in self._gradients.inside,
            lambda name: name in self._gradients.sharded,
            lambda name: self._replicas.compares(name),
            self._find_made,
            suspects.convict,
        )
        self._gradients = gradients = GradientSensor(
            every, self._find_roots, self._collectives.num_sent, self._mixing.measured
        )
        self._trail = trail = LastSites(models.is_watched, self._may_use_buffers, gradients.add)
        self._averaging = averaging = AveragingWatch(self._collectives, book)

        self._replicas = ReplicaWatch(
            every,
            trail,
            suspects,
            book.report,
            book.explains_divergence,
            vitals_taken,
        )
        self._stacks = stacks = StackWatch()
        self._wraps = WrapWatch(models, count, trail, self._replicas, stacks, emit, guard, keep)
        self._sharded = sharded = ShardedWatch(keep)
        self._hooks = hooks = HookWatch(emit, count.preparing, keep, self._hook_registered)
        self._compiled = CompiledWatch(emit, count.preparing, keep, hooks.tap)
        self._steps = StepWatch(
            models,
            count,
            self._collectives,
            self._replicas,
            suspects,
            averaging,
            trail,
            self._compiled,
            sharded,
            gradients,
            self._wraps.stepping,
            book,
            emit,
            guard,
        )
        for entry in internals.list_missing("watch"):
            missing(f"what needs {entry.name}", internals.TorchNameMissing(entry.sentence()))
        for part, attach in (
            ("copies of watched models", strip_forward_taps),
            ("DistributedDataParallel and replicate", self._wraps.attach),
            ("parameters changed after wrapping", ParameterWatch(models, guard, self._wraps.tap).attach),
            ("process groups", stacks.attach_groups),
            ("backwards", BackwardWatch(models, gradients, guard).attach),
            ("collectives and optimizer steps", self._attach_steps),
            ("hooks of modules", hooks.attach),
            ("torch.compile", self._compiled.attach),
            ("load_state_dict, train and eval, optimizers and schedulers", trail.attach),
        ):
            self._attach(part, attach)
        self._attach_after_import("fully_shard", FULLY_SHARD, sharded.attach)
        for name, path, stack in STACKS:
            self._attach_after_import(stack, name, partial(stacks.attach, path=path, stack=stack))
        saves = SaveWatch(models, trail.use_buffers, guard)
        for name in SAVERS:
            self._attach_after_import("checkpoints", name, saves.attach)
        self._precision = precision = PrecisionWatch(emit, count.preparing, keep)
        self._attach_after_import("accelerate's mixed precision", "accelerate.accelerator", precision.attach)

    def _attach(self, part: str, attach: Callable[[], Undo]) -> None:
        """Attach one part of the watch; where that fails it is said, and the others are attached."""
        try:
            self.keep(attach())
        except Exception as error:
            self._missing(part, error)

    def _attach_after_import(self, part: str, name: str, attach: Callable[[ModuleType], Undo]) -> None:
        """Attach a part to a module once it is imported."""

        def patch(module: ModuleType) -> Undo:
            try:
                return attach(module)
            except Exception as error:
                self._missing(part, error)
                return lambda: None

        self.keep(after_import(name, patch))

    def _attach_steps(self) -> Undo:
        """Steps are not judged without the log of collectives: gradients reduced by hand would look unreduced."""
        with ExitStack() as stack:
            stack.callback(self._collectives.attach())
            stack.callback(self._steps.attach())
            return stack.pop_all().close

    def _find_made(self, optimizer: Optimizer) -> CallSite:
        """Return the line that handed parameters to an optimizer last."""
        return self._trail.additions.get(optimizer) or self._trail.optimizers.get(optimizer, NOWHERE)

    def _find_roots(self) -> list[nn.Module]:
        """Return the modules inside the wrapped models that are known."""
        ledgers = [root for ledger in self._models.ledgers if (root := ledger.root()) is not None]
        return [*ledgers, *self._sharded.roots()]

    def _guard(self, work: Callable[..., Any], *args: Any) -> None:
        """Do the watch's own work: an error of ours is said once and never reaches the script."""
        try:
            work(*args)
        except WatchError:
            raise
        except Exception as error:
            self._faults.append(f"{type(error).__name__}: {error}".splitlines()[0])
            if len(self._faults) == 1:
                say(f"ddpcall watch: an error of its own, please report it\n{traceback.format_exc()}")

    def keep(self, undo: Undo) -> None:
        """Take an undo, for the end."""
        self._undo.callback(undo)

    def _hook_registered(self, module: nn.Module, kind: str, hook: Any) -> None:
        for watch in (self._wraps, self._compiled, self._sharded):
            watch.hook_registered(module, kind, hook)

    def _may_use_buffers(self, module: nn.Module) -> int | None:
        """Return the steps done, if this module's buffers may be rank-local now: not broadcast since the last."""
        done = self._count.lead_done()
        for ledger in self._models.ledgers:
            ddp = ledger.ddp()
            if ddp is None or done is None or module not in (ddp, ddp.module) or not ddp.modules_buffers:
                continue
            # Counters such as num_batches_tracked need no averaging.
            buffers = [buffer for buffer in ddp.modules_buffers if buffer.is_floating_point()]
            if not ledger.forwarded and buffers and not self._collectives.covers(buffers):
                return done
        return None

    def adopt(self, root: nn.Module) -> None:
        """Watch a model that was wrapped, compiled or hooked before the watch began."""
        for module in reversed(list(root.modules())):  # from the leaves up, as fully_shard is called
            if module in self._adopted or not can_be_tapped(module):
                continue
            self._adopted.add(module)
            try:
                self._adopt(module)
            except Exception as error:
                self._missing(f"{type(module).__name__}, made before the watch began", error)

    def adopt_living(self) -> None:
        """Watch all models that live in this process, whoever holds them.

        Optimizers need no search: torch itself tells of every step.
        """
        accelerator = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", nn.Module)
        try:
            found = find_living(nn.Module, accelerator)
        except TimeoutError as error:
            self._missing("models made before the watch began", error)
            return
        modules = [each for each in found if issubclass(type(each), nn.Module)]
        children = internals.MODULE_TABLES["modules"].name
        inner = {id(child) for module in modules for child in module.__dict__.get(children, {}).values()}
        for module in modules:
            if id(module) not in inner and children in module.__dict__:  # else its __init__ was never called
                self.adopt(module)
        for each in found:
            if not issubclass(type(each), nn.Module):
                self._guard(self._precision.adopt, each)

    def _adopt(self, module: nn.Module) -> None:
        if isinstance(module, DistributedDataParallel):
            self._wraps.adopt(module, earlier=True)
        self._compiled.adopt(module)
        for kind, slot in internals.HOOK_DICTS.items():
            for hook in list(slot.of(module).values()):
                self._hooks.hear(module, hook)
                self._wraps.hook_registered(module, kind, hook)
                self._sharded.hook_registered(module, kind, hook)
                state = getattr(hook, "__self__", None)
                ddp = internals.REPLICATE_STATE_DDP.of(state, None)
                if (
                    isinstance(state, internals.REPLICATE_STATE.get(())) and ddp is not None
                ):  # made in its first forward
                    self._wraps.adopt(ddp, earlier=True)

    def explain_crash(self, error: BaseException) -> None:
        """Emit an event if a bypass caused the exception that ends the script."""
        event = self._sharded.explain(error, self._count.preparing())
        if event is not None:
            self._emit(event)

    def look(self, record: Watched) -> Watched:
        """Return a record with what this rank has seen so far, also after the end."""
        ledgers = self._models.ledgers
        followed = [WatchedModel(each.name, each.wrapper, each.num_steps) for each in ledgers if each.in_use]
        not_followed = list(self._stacks.not_followed)
        if any(ledger.num_reductions > 1 and not ledger.num_steps for ledger in ledgers):
            not_followed.append(BY_HAND)
        replicas, world_size = self._replicas, max(record.world_size, self._stacks.group_size)
        return replace(
            record,
            mixing=asdict(self._mixing.certificate),
            not_measured=self._gradients.failure or self._mixing.trouble,
            attached=True,
            world_size=world_size,
            elsewhere=tuple(sorted({*record.elsewhere, *replicas.heard} - set(record.ranks))),
            models=(*followed, *self._sharded.watched_models()),
            optimizer_steps=self._count.most,
            idle_ranks=() if self._count.most else record.ranks,
            comparisons=replicas.num_compared,
            comparisons_due=replicas.num_due,
            not_compared=replicas.trouble,
            process_group=self._stacks.group_size,
            own_collectives=self._collectives.num_called,
            may_average=self._count.most > 0 and self._collectives.may_average(self._steps.numel),
            not_followed=tuple(not_followed),
            faults=tuple(dict.fromkeys(self._faults)),
        )

    def close(self, in_order: bool = True) -> None:
        """Take everything off again; what was waiting for a better line or a last comparison is emitted first.

        Args:
            in_order: Whether the script came to its end; other ranks are not waited for where it did not.
        """
        with ExitStack() as last:  # each of these, though an earlier one raises its finding
            last.callback(self.detach)
            for work in (
                partial(self._replicas.close, in_order),
                self._mixing.close,
                self._steps.close,
                partial(self._mixing.finish, in_order),
                self._compiled.close,
                self._book.release,
                self._steps.stop_locating,
                self._averaging.look,
            ):
                last.callback(self._guard, work)

    def detach(self) -> None:
        """Take everything off, and say nothing."""
        self._gradients.stop()
        self._models.close()
        self._undo.close()
