"""The watch's sensors and rules, put on together and taken off together."""

from __future__ import annotations

import sys
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
from ddpcall.taps import Undo, strip_forward_taps, undo_all
from ddpcall.watch.compare.exchange import RunExchange
from ddpcall.watch.compare.hang_watch import HangWatch
from ddpcall.watch.compare.mixing_watch import MixingWatch
from ddpcall.watch.compare.replica_watch import ReplicaWatch
from ddpcall.watch.compare.statistics_watch import StatisticsWatch
from ddpcall.watch.findings_book import FindingsBook
from ddpcall.watch.output.streams import say
from ddpcall.watch.output.watched import BY_HAND, Watched, WatchedModel
from ddpcall.watch.rules import make_rules
from ddpcall.watch.rules.compiled import CompiledRule
from ddpcall.watch.rules.draws import DrawRule
from ddpcall.watch.rules.gathers import GatherRule
from ddpcall.watch.rules.hooks import HooksRule
from ddpcall.watch.rules.own_numbers import OwnNumbers
from ddpcall.watch.rules.ownership import OwnershipRule
from ddpcall.watch.rules.precision import PrecisionRule
from ddpcall.watch.rules.sharded import ShardedRule
from ddpcall.watch.rules.shares import ShareRule
from ddpcall.watch.rules.unreduced import UnreducedRule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.backwards import BackwardWatch
from ddpcall.watch.sensors.clipping import ClippingSensor
from ddpcall.watch.sensors.earlier import find_living, find_roots
from ddpcall.watch.sensors.gathers import STRATEGIES
from ddpcall.watch.sensors.hooks import can_be_tapped
from ddpcall.watch.sensors.loaders import LoaderSensor, PassListener
from ddpcall.watch.sensors.parameters import ParameterWatch
from ddpcall.watch.sensors.saves import SAVERS, SaveWatch
from ddpcall.watch.sensors.sharded import FULLY_SHARD
from ddpcall.watch.sensors.stacks import STACKS, StackWatch
from ddpcall.watch.sensors.steps import StepSensor
from ddpcall.watch.sensors.wrapping import WrapWatch


class Attachment:
    """The sensors and rules of one watched run on this rank.

    Entry points are patched on their classes; modules under a wrapper get forward taps on the instance, parameters
    hooks when they are needed. What sensors see, and rules go by, stands in one `Run`.
    """

    def __init__(
        self,
        book: FindingsBook,
        *,
        missing: Callable[[str, Exception], None],
        every: int = 0,
        hang_after_s: float = 0.0,
        vitals_taken: Callable[[], None] = lambda: None,
    ) -> None:
        """Attach to torch; models are found as they are wrapped from now on.

        Args:
            book: Gets every finding, on the thread it happened on.
            missing: Gets what cannot be watched, in plain words, and why; also when a library is imported later.
            every: Ranks compare vitals every so many optimizer steps; 0 for never.
            hang_after_s: Seconds in a collective after which it is said where all ranks are; 0 for never.
            vitals_taken: Is called at the steps after which vitals are taken.
        """
        self._missing = missing
        self._adopted: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._run = run = Run(book)
        self.keep = run.keep
        self._exchange = exchange = RunExchange()
        self._hangs = hangs = HangWatch(run, hang_after_s, say)
        self._mixing = mixing = MixingWatch(run, exchange, every, self._find_roots)
        self._gradients = gradients = mixing.gradients
        self._hooks = HooksRule(run, self._hook_registered)
        self._compiled = CompiledRule(run, self._hooks.sensor.tap)
        self._sharded = ShardedRule(run)
        self._precision = PrecisionRule(run)
        shares, draws = ShareRule(run), DrawRule(run, lambda: self._compiled.sensor.is_used)
        self._replicas = ReplicaWatch(run, exchange, every, vitals_taken, shares, draws)
        numbers = OwnNumbers(run, gradients, lambda: not exchange.trouble and gradients.is_compared())
        unreduced = UnreducedRule(run, numbers)
        # In the order in which they are asked about a step, and about the end.
        run.rules = (
            hangs,
            numbers,
            unreduced,
            OwnershipRule(run, numbers),
            *make_rules(run),
            gathers := GatherRule(run, gradients.expects_measuring),
            self._compiled,
            self._sharded,
            self._hooks,
            self._precision,
            shares,
            mixing,
            self._replicas,
            StatisticsWatch(run, gradients.roots),
        )
        passes = [rule for rule in run.rules if isinstance(rule, PassListener)]
        self._stacks = stacks = StackWatch()
        self._wraps = wraps = WrapWatch(
            run, stacks, self._replicas.adopt, self._forward_begins, unreduced.window_without_effect
        )
        self._steps = StepSensor(run, wraps.stepping)
        for entry in internals.list_missing("watch"):
            missing(f"what needs {entry.name}", internals.TorchNameMissing(entry.sentence()))
        for part, attach in (
            ("copies of watched models", strip_forward_taps),
            ("DistributedDataParallel and replicate", wraps.attach),
            ("parameters changed after wrapping", ParameterWatch(run, wraps.tap).attach),
            ("process groups", partial(stacks.attach_groups, partial(run.contain, hangs.group_made))),
            ("backwards", BackwardWatch(run, gradients, mixing.losses).attach),
            ("collectives and optimizer steps", self._attach_steps),
            ("gradient clipping", ClippingSensor(run).attach),
            ("losses", mixing.losses.attach),
            *((rule.part, rule.attach) for rule in run.rules if rule.part),
            ("data loaders", LoaderSensor(run, passes, draws.sensor.taking).attach),
            (
                "load_state_dict, train and eval, optimizers and schedulers",
                partial(run.sites.attach, gradients.add),
            ),
        ):
            run.keep(self._attach(part, attach))
        for part, name, attach in (
            ("fully_shard", FULLY_SHARD, self._sharded.sensor.attach),
            *((stack, name, partial(stacks.attach, path=path, stack=stack)) for name, path, stack in STACKS),
            *(("Lightning's all_gather", name, gathers.sensor.attach_strategy) for name in STRATEGIES),
            *(("checkpoints", name, SaveWatch(run).attach) for name in SAVERS),
            ("accelerate's mixed precision", "accelerate.accelerator", self._precision.sensor.attach),
        ):
            run.keep(after_import(name, partial(self._attach, part, attach)))

    def _attach(self, part: str, attach: Callable[..., Undo], *module: ModuleType) -> Undo:
        """Attach one part of the watch; where that fails it is said, and the others are attached.

        Args:
            part: In plain words.
            attach: Attaches it, and returns the undo.
            module: The one that was imported, where the part waits for it.
        """
        try:
            return attach(*module)
        except Exception as error:
            self._missing(part, error)
            return lambda: None

    def _attach_steps(self) -> Undo:
        """Steps are not judged without the log of collectives: gradients reduced by hand would look unreduced."""
        return undo_all(part.attach() for part in (self._run.collectives, self._steps))

    def _forward_begins(self, step: int, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hangs.begin_forward()
        self._replicas.note_inputs(step, inputs, kwargs)

    def _find_roots(self) -> list[nn.Module]:
        """Return the modules inside the wrapped models that are known."""
        wrapped = [root for state in self._run.models.reducer_states if (root := state.root()) is not None]
        return [*wrapped, *self._sharded.sensor.roots()]

    def _hook_registered(self, module: nn.Module, kind: str, hook: Any) -> None:
        for sensor in (self._wraps, self._compiled.sensor, self._sharded.sensor):
            sensor.hook_registered(module, kind, hook)

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
        """Watch all models of this process, also those that only a library holds.

        Torch tells of every optimizer's steps; one that is found here is measured in the first of them.
        """
        accelerator = getattr(sys.modules.get("accelerate.accelerator"), "Accelerator", nn.Module)
        try:
            found = find_living(nn.Module, accelerator, Optimizer)
        except TimeoutError as error:
            self._missing("models made before the watch began", error)
            return
        for root in find_roots(each for each in found if issubclass(type(each), nn.Module)):
            self.adopt(root)
        for each in found:
            if issubclass(type(each), Optimizer):
                self._run.contain(self._adopt_optimizer, each)
            elif not issubclass(type(each), nn.Module):
                self._run.contain(self._precision.sensor.adopt, each)

    def _adopt_optimizer(self, optimizer: Optimizer) -> None:
        """Measure the parameters of an optimizer from its first step, if it holds any of a wrapped model."""
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(id(parameter) in self._run.models.owner for parameter in held):
            self._gradients.add(optimizer)

    def _adopt(self, module: nn.Module) -> None:
        if isinstance(module, DistributedDataParallel):
            self._wraps.adopt(module, earlier=True)
        self._compiled.sensor.adopt(module)
        for kind, slot in internals.HOOK_DICTS.items():
            for hook in list(slot.of(module).values()):
                self._hooks.sensor.hear(module, hook)
                self._wraps.hook_registered(module, kind, hook)
                self._sharded.sensor.hook_registered(module, kind, hook)
                state = getattr(hook, "__self__", None)
                ddp = internals.REPLICATE_STATE_DDP.of(state, None)
                if (
                    isinstance(state, internals.REPLICATE_STATE.get(())) and ddp is not None
                ):  # made in its first forward
                    self._wraps.adopt(ddp, earlier=True)

    def explain_crash(self, error: BaseException) -> None:
        """Report a bypass that caused the exception that ends the script."""
        self._sharded.explain_crash(error)
        self._run.contain(self._hangs.explain_crash, error)

    def look(self, record: Watched) -> Watched:
        """Return a record with what this rank has seen so far, also after the end."""
        run, replicas, stacks = self._run, self._replicas, self._stacks
        states = run.models.reducer_states
        followed = [WatchedModel(each.name, each.wrapper, each.num_steps) for each in states if each.in_use]
        not_followed = list(stacks.not_followed)
        if any(state.num_reductions > 1 and not state.num_steps for state in states):
            not_followed.append(BY_HAND)
        return replace(
            record,
            mixing=asdict(self._mixing.certificate),
            not_measured=self._gradients.failure or self._exchange.trouble,
            attached=True,
            world_size=max(record.world_size, stacks.group_size),
            elsewhere=tuple(sorted({*record.elsewhere, *replicas.heard} - set(record.ranks))),
            models=(*followed, *self._sharded.sensor.watched_models()),
            optimizer_steps=run.steps.most,
            idle_ranks=() if run.steps.most else record.ranks,
            comparisons=replicas.num_compared,
            comparisons_due=replicas.num_due,
            not_compared=self._exchange.trouble,
            process_group=stacks.group_size,
            own_collectives=run.collectives.num_called,
            may_average=run.steps.most > 0 and run.collectives.may_average(self._steps.numel),
            not_followed=tuple(not_followed),
            faults=tuple(dict.fromkeys(run.faults)),
        )

    def close(self, in_order: bool = True, is_over: bool = False) -> None:
        """Judge what has waited for the end, compare once more, and take everything off.

        Args:
            in_order: Whether the script came to its end; other ranks are not waited for where it did not.
            is_over: Whether the script is over, and not only what was watched of it.
        """
        self._run.contain(self._hangs.leave, in_order, is_over)
        with ExitStack() as last:  # each is closed, though an earlier one raises its finding
            last.callback(self.detach)
            for rule in reversed(self._run.rules):  # a stack is left from its end: the first rule is closed first
                last.callback(self._run.contain, rule.close, in_order)

    def detach(self) -> None:
        """Take everything off, and say nothing."""
        self._gradients.stop()
        self._run.detach()
