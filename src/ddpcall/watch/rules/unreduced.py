"""DC101 and DC104: gradients that an optimizer uses as one rank computed them, since no reducer averaged them."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from ddpcall import torch_internals as internals
from ddpcall.findings import CATALOGUE, Finding, Severity
from ddpcall.replicas import digest_tensor
from ddpcall.taps import NOWHERE, CallSite, find_call_site
from ddpcall.watch.advice import Advice, advise
from ddpcall.watch.findings_book import Status
from ddpcall.watch.rules.own_numbers import OwnNumbers
from ddpcall.watch.rules.rule import Rule, and_lines, count_parameters, make_finding
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.locate import WeightLocator, has_compiled
from ddpcall.watch.sensors.reducer_state import Cause, ReducerState, Unreduced, address_of, nonzero
from ddpcall.watch.sensors.steps import Step

_AVERAGE = "`dist.all_reduce(p.grad)`, then `p.grad /= dist.get_world_size()`"
WRITTEN = "written"
_FIXES: dict[str, str] = {
    Cause.RAW_WEIGHTS: "Use these weights inside the model's `forward`, and call the wrapper.",
    Cause.IN_FORWARD: "Average the gradients of that backward before the step, for each parameter `p`: "
    f"{_AVERAGE}.",
    Cause.CONSUMED: "Add the losses up and call `backward()` once, or call the wrapper before each backward.",
    Cause.AUTOGRAD_GRAD: "Use `loss.backward()`, or average what `torch.autograd.grad` returns, for each "
    "gradient `g`: `dist.all_reduce(g)`, then `g /= dist.get_world_size()`.",
    WRITTEN: f"Average the gradients after writing them, for each parameter `p`: {_AVERAGE}.",
}


class UnreducedRule(Rule):
    """Gradients that arrived while the reducer was not armed are harm when an optimizer uses them.

    Blind to: gradients that no parameter's hook sees; see `ReducerState` and `CollectiveLog`.
    """

    def __init__(self, run: Run, numbers: OwnNumbers) -> None:
        super().__init__(run)
        self._numbers = numbers
        self._locator: WeightLocator | None = None
        self._held: tuple[Hashable, Use] | None = None
        self._located: dict[Hashable, CallSite] = {}

    def before_step(self, step: Step) -> None:
        """Look no longer for the line of what was withdrawn."""
        if self._held is not None and self._run.book.status(self._held[0]) is Status.WITHDRAWN:
            self._stop_locating()

    def judge(self, step: Step) -> None:
        """Report gradients that came from a backward nobody reduced, or from none at all."""
        if not dist.is_initialized():
            return
        for state in step.states:
            if state.dirty:
                self._judge_arrived(state, step)
            elif not state.detached and not state.had_backward:
                self._judge_written(state, step)

    def _judge_arrived(self, state: ReducerState, step: Step) -> None:
        by_blame: dict[int, tuple[Unreduced, list[int]]] = {}
        for key, blame in state.dirty.items():
            by_blame.setdefault(id(blame), (blame, []))[1].append(key)
        for blame, keys in by_blame.values():
            used = [key for key in keys if _is_used(key, blame, step)]
            if not used:
                continue
            steps_in_forward = blame.cause is Cause.IN_FORWARD and state.is_in_forward()
            site = find_call_site() if steps_in_forward else blame.site
            use = Use(
                blame.cause,
                site,
                step.number,
                tuple(state.names[key] for key in used),
                blame.others,
                blame.backward,
                state.name,
                advise(blame.names),
                state.was_called,
                state.is_replicate(),
            )
            harm = (blame.cause, blame.site, id(state))
            if not self._numbers.weigh(harm, use.explain(), step, used, state.unarmed_since):
                continue
            if blame.cause is Cause.RAW_WEIGHTS and not (has_compiled() or self._run.book.stops):
                self._report_located(harm, use, used)
            else:
                self._run.book.report(use.explain(), harm)

    def _judge_written(self, state: ReducerState, step: Step) -> None:
        """Gradients without any backward: the script wrote them, perhaps the same on all ranks."""
        used = [key for key in state.names if nonzero(step.gradients([key]))]
        if used:
            site, names = find_call_site(), tuple(state.names[key] for key in used)
            message = (
                f"No backward of {state.name} ran before optimizer step {step.number}: gradients of "
                f"{count_parameters(names)} were written to .grad by hand, and they differ between ranks."
            )
            found = make_finding(
                "DC101", WRITTEN, site, message, step=step.number, parameters=names, fix=_FIXES[WRITTEN]
            )
            self._run.book.suspect((WRITTEN, site, id(state)), found)
            # Without a backward nothing is measured: ranks compare digests where their weights differ.
            self._run.written = hash(tuple(map(digest_tensor, step.gradients(used))))

    def window_without_effect(self, site: CallSite) -> None:
        """Report a `no_sync()` that came too late for its backward, and was not needed for any other."""
        message = (
            "no_sync() around a backward alone has no effect: the forward before it had already prepared DDP to "
            "average, and the gradients were averaged."
        )
        self.report("DC104", "no_sync_without_effect", site, message, severity=Severity.WARNING)

    # ---- raw weights: the line is looked for in the next step ------------------------------------------------

    def _report_located(self, harm: Hashable, use: Use, keys: list[int]) -> None:
        """Report that weights were used directly, once the line that uses them was seen in the next step."""
        book = self._run.book
        if harm in self._located:
            book.report(replace(use, site=self._located[harm]).explain(), harm)
        elif self._locator is None:
            book.hold(harm, use.explain())
            self._held, self._locator = (harm, use), WeightLocator(keys, self._run.models.owner[keys[0]])
            self._locator.start()
        elif self._held is not None and harm == self._held[0]:
            first = self._held[1]
            self._located[harm] = self._locator.site or first.site
            self._stop_locating()
            book.report(replace(first, site=self._located[harm]).explain(), harm)
        else:
            book.report(use.explain(), harm)

    def _stop_locating(self) -> None:
        if self._locator is not None:
            self._locator.stop()
            self._locator = None

    def close(self, in_order: bool) -> None:
        """Report what was held: no better line will come."""
        self._stop_locating()
        self._run.book.release()


def _is_used(key: int, blame: Unreduced, step: Step) -> bool:
    """Say whether a gradient that arrived unreduced is the one that the optimizer has."""
    parameter = step.get(key)
    if parameter is None or parameter.grad is None:
        return False
    if not nonzero([parameter.grad]):
        # Computed as zero, past the wrapper: not synchronized. Zeroed since: nothing to synchronize.
        version = internals.TENSOR_VERSION.of(parameter.grad)
        return blame.cause is Cause.BYPASSED and blame.versions.get(key) == version
    return blame.cause is not Cause.AUTOGRAD_GRAD or address_of(parameter.grad) != blame.gradient


# ---- what is said -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """Gradients that nobody reduced, used in an optimizer step.

    Attributes:
        cause: What left them unreduced.
        site: The line to blame.
        step: The optimizer's step, from 1.
        parameters: Their names.
        others: Further lines.
        backward: The line that ran their backward.
        model: The wrapped module's class.
        advice: What the line can call the model, and what to write instead.
        was_called: Whether the wrapper was ever called.
        is_replicate: Whether the wrapper is a hook of the model's own.
    """

    cause: Cause
    site: CallSite
    step: int
    parameters: tuple[str, ...]
    others: tuple[CallSite, ...] = ()
    backward: CallSite = NOWHERE
    model: str = "the model"
    advice: Advice = field(default_factory=Advice)
    was_called: bool = True
    is_replicate: bool = False

    def explain(self) -> Finding:
        """Return the finding: the mechanism, and the line to write, in the script's names."""
        messages = {
            Cause.BYPASSED: self._bypassed,
            Cause.RAW_WEIGHTS: self._raw_weights,
            Cause.IN_FORWARD: self._in_forward,
            Cause.CONSUMED: self._consumed,
            Cause.AUTOGRAD_GRAD: self._autograd_grad,
            Cause.SYNC_OFF: self._sync_off,
        }
        return make_finding(
            "DC104" if self.cause is Cause.SYNC_OFF else "DC101",
            self.cause.value,
            self.site,
            messages[self.cause](),
            step=self.step,
            parameters=self.parameters,
            fix=self._fix(),
        )

    def _fix(self) -> str:
        """Return what to write instead: in the script's names, if the line has them."""
        cause, advice = self.cause, self.advice
        fix = _FIXES.get(cause, CATALOGUE["DC104" if cause is Cause.SYNC_OFF else "DC101"].fix)
        if cause is Cause.BYPASSED and self.others:
            wrapper = f"the wrapper, `{advice.wrapper}`," if advice.wrapper else "the wrapper"
            fix = f"Let `forward` do what these lines do, and call {wrapper} once."
        elif cause is Cause.BYPASSED and advice.fix:
            fix = advice.fix
        elif cause is Cause.BYPASSED and advice.wrapper:
            fix = fix.replace("`loss = ddp(batch)`", f"`{advice.wrapper}(...)`")
        package = re.search(r"/(?:site|dist)-packages/([^/]+)", self.site.file)
        if package and cause in (Cause.BYPASSED, Cause.RAW_WEIGHTS):
            library = package[1].removesuffix(".py")
            fix += f" The line is {library}'s: override it in code of your own, or report it there."
        return fix

    def _local(self) -> str:
        """Return what the harm is, of gradients that nobody averaged."""
        count = count_parameters(self.parameters)
        return f"optimizer step {self.step} used gradients of {count} as computed on this rank alone."

    def _wrapper(self) -> tuple[str, str]:
        """Return what a call goes past, and when that averages."""
        if self.is_replicate:
            return (
                "`replicate` hook",
                "`replicate` averages gradients only in a backward that follows a call of the model",
            )
        name = f" `{self.advice.wrapper}`" if self.advice.wrapper else ""
        averaged = "DDP averages gradients only in a backward that follows a forward of the wrapper"
        return f"DistributedDataParallel wrapper{name}", averaged

    def _bypassed(self) -> str:
        advice, model, lines = self.advice, self.model, and_lines(self.site, self.others)
        through = f"`{advice.called}`" if advice.called else ""
        wrapper, averaged = self._wrapper()
        if advice.is_handed_over:
            entered = f"{through} ({model}) is handed over here{lines}, and is called past its {wrapper}"
        elif self.was_called:
            entered = (
                f"The forward entered {model} here{lines}{through and f' through {through}'}, past its {wrapper}"
            )
        else:
            called = f"{through} ({'a part of ' * advice.is_part}{model})" if through else model
            entered = f"{called} is called here{lines}; its {wrapper} was never called"
        return f"{entered}. {averaged}: {self._local()}"

    def _raw_weights(self) -> str:
        wrapper, averaged = self._wrapper()
        before = "since the optimizer step before" if self.was_called else "at all"
        return (
            f"Weights of {self.model} are used here, and its {wrapper} was not called {before}. {averaged}: "
            f"{self._local()}"
        )

    def _in_forward(self) -> str:
        backward = self.backward
        line = f"line {backward.line}" if backward.file == self.site.file else f"{backward.file}:{backward.line}"
        here = " here" if backward == self.site else f" ({line})"
        averaged = self._wrapper()[1]
        return f"{self.model} ran a backward{here} inside its wrapper's forward. {averaged}: {self._local()}"

    def _consumed(self) -> str:
        return (
            f"A forward of {self.model}'s wrapper prepares DDP to average the gradients of one backward, and an "
            f"earlier backward had used that up when this one ran: {self._local()}"
        )

    def _autograd_grad(self) -> str:
        return (
            f"torch.autograd.grad returns gradients without accumulating them, so the reducer of {self.model} "
            f"never sees them: in optimizer step {self.step}, gradients of {count_parameters(self.parameters)} "
            "were used unreduced."
        )

    def _sync_off(self) -> str:
        return (
            "Synchronization was switched off here when the last forward of "
            f"{self.model}{and_lines(self.site, self.others)} before optimizer step {self.step} ran: "
            f"gradients of {count_parameters(self.parameters)} were used unreduced."
        )
