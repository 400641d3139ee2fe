"""One trial: build the model, wrap it, train it N steps along one call path, observe, and take it all down."""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpcall.evidence import Cell, Failure
from ddpcall.lab.checkpoint import Checkpoints
from ddpcall.lab.console import warn
from ddpcall.lab.data import Split, iterate_batches
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.held_out import Examiner
from ddpcall.lab.models import build_model, default_loss
from ddpcall.lab.rank_report import RankReport
from ddpcall.lab.schema import OptimizerConfig, TrainConfig
from ddpcall.lab.stop import SAVE_SECONDS, Stop
from ddpcall.lab.trial_state import (
    is_resumable,
    put_random_state,
    put_tensors,
    take_random_state,
    take_settings,
    take_tensors,
)
from ddpcall.lab.user_code import load_loss, load_path, load_target, own_arguments, wrap_by_target
from ddpcall.lab.world import Accelerator, World, process_group
from ddpcall.paths import (
    Batch,
    CallPath,
    Mode,
    SyncWindow,
    enter_backward_window,
    enter_forward_window,
    enter_mode,
    invoke,
    is_training,
    split_batch,
)
from ddpcall.probes.catalogue import PROBES
from ddpcall.probes.mixing import NUM_MEASURED
from ddpcall.probes.probe import Observer, Setting
from ddpcall.probes.timeline import WARM_UP_STEPS
from ddpcall.replicas import digest_state
from ddpcall.shards import gather_state, is_sharded, local_state
from ddpcall.taps import SpanLog
from ddpcall.torch_internals import TorchNameMissing
from ddpcall.wrappers import WRAPPERS, CompileBackend, Subject, WrapperMissing, apply_wrapper

NUM_EVALUATED = 64  # test samples for the comparison of the ranks' outputs in eval mode
MISSING_STEPS = 2  # how many batches fewer the last rank has, where inputs are uneven
OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


class Trial:
    """One cell of a grid on one rank."""

    def __init__(
        self,
        cell: Cell,
        config: TrainConfig,
        split: Split,
        world: World,
        accelerator: Accelerator,
        *,
        observe: bool,
        checkpoints: Checkpoints | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.cell = cell
        self._config = config
        self._split = split
        self._world = world
        self._accelerator = accelerator
        self._observe = observe
        self._checkpoints = checkpoints
        self._stop = stop
        self._wrapper, self._spec = cell.wrapper, WRAPPERS[cell.wrapper]
        self._path = CallPath(cell.path)
        self._mode = Mode(cell.mode)
        self._window = SyncWindow(cell.window)
        self._step = -1
        self._observers: dict[str, Observer] = {}
        self._loss_function = load_loss(config.loss) if config.loss else default_loss
        self._invoke = (
            load_path(config.path) if self._path is CallPath.CUSTOM else functools.partial(invoke, self._path)
        )
        self._examiner: Examiner | None = None
        self._began = time.monotonic()
        self.report = RankReport()

    def run(self, name: str, reference: Tensor | None = None) -> RankReport:
        """Run the trial in a process group of its own; an exception becomes part of the report.

        Args:
            name: Unique in the run; names the process group's keys in the store.
            reference: The synchronized run's parameters, flat; None: no distance is computed.

        Raises:
            WrongUse: The model cannot be built, lacks what the call path needs, or the wrapper is not installed.
        """
        # gloo gives up after the deadline has spoken, so that a hang is reported with its stacks.
        timeout_s = self._config.trial_timeout_s + 60
        with process_group(self._world, self._accelerator, name, timeout_s) as probe_group:
            try:
                self._run_observed(probe_group, reference)
            except WrongUse:
                raise
            except Exception as error:
                self.report.failure = self._describe(error)
                # The traceback's frames hold the DDP object, which must be gone before the group is.
                traceback.clear_frames(error.__traceback__)
            self._observers.clear()
            self._examiner = None
        return self.report

    def _describe(self, error: Exception) -> Failure:
        return Failure(
            rank=self._world.rank,
            step=self._step,
            kind=type(error).__name__,
            message=str(error),
            traceback="".join(traceback.format_exception(error)),
            seconds=time.monotonic() - self._began,
        )

    def _run_observed(self, probe_group: dist.ProcessGroup | None, reference: Tensor | None) -> None:
        self._examiner = Examiner(self._build, self._split.test, self._accelerator.device, self._loss_function)
        torch.manual_seed(self._config.seed)
        model = self._build_model()
        setting = self._describe_setting(probe_group)
        with ExitStack() as compiling:
            self._enter_probes(compiling, setting, before_wrapping=True)
            subject = setting.subject = self._wrap(model, setting.compile_backend)
            # After wrapping: sharding wrappers put other parameters in the place of the user's.
            parameters = dict(subject.inner.named_parameters())
            optimizer = setting.optimizer = build_optimizer(parameters.values(), self._config.optimizer)
            setting.sharded = frozenset(name for name, p in parameters.items() if is_sharded(subject, p))
            if self._mode is Mode.SEEDED_BY_RANK:
                torch.manual_seed(self._config.seed + self._world.rank)
            if not is_resumable(self._wrapper, subject.inner):
                self._checkpoints = None
            rest = self._resume(subject, optimizer, probe_group)
            with ExitStack() as stack:
                self._enter_probes(stack, setting, before_wrapping=False)
                self._put_rest(rest)
                try:
                    with subject.session():
                        self._train(subject, parameters, optimizer, probe_group)
                    self._close_missing_steps()
                finally:
                    self._take_evidence(outlives_failure=True)
                state = gather_state(subject, parameters)
                flat = torch.cat([state[name].reshape(-1).float() for name in parameters])
                self._compare_parameters(flat, probe_group, reference)
                self.report.digest = digest_state(state)
                score = self._examiner.examine(state)
                self.report.test_loss, self.report.test_accuracy = score.loss, score.accuracy
                self._take_evidence(outlives_failure=False)  # last: it may run the live model
            self._observers.clear()

    def _describe_setting(self, group: dist.ProcessGroup | None) -> Setting:
        probes = self._config.probes
        return Setting(
            spec=self._spec,
            device=self._accelerator.device,
            steps=self._config.steps,
            log=SpanLog(),
            group=group,
            example=self._split.test.inputs[:NUM_EVALUATED].to(self._accelerator.device),
            late_hooks=self.cell.hooks == "late",
            hook_steps=probes.hook_steps,
            global_hooks=probes.global_hooks,
            compile_backend=self._spec.compile_backend or self._config.wrapper.compile_backend,
            observers=self._observers,
        )

    def _enter_probes(self, stack: ExitStack, setting: Setting, *, before_wrapping: bool) -> None:
        for probe in PROBES if self._observe else ():
            is_on = getattr(self._config.probes, probe.name, True)
            if probe.before_wrapping != before_wrapping or not is_on:
                continue
            try:
                observing = probe.observe(setting)
                if observing is not None:
                    self._observers[probe.name] = stack.enter_context(observing)
            except TorchNameMissing as error:
                if self._world.rank == 0:
                    warn(f"the verdict {probe.name} of {self._wrapper} is none: {error}")

    def _take_evidence(self, *, outlives_failure: bool) -> None:
        """Keep what the observers found: what needs no other rank also when the trial raised."""
        for name, observer in self._observers.items():
            if observer.outlives_failure == outlives_failure:
                found = self.report.parts[name] = observer.evidence()
                self.report.columns |= observer.columns(found)

    def _build(self) -> nn.Module:
        settings = {"_target_": self.cell.model} if self._config.grid.model else self._config.model
        return build_model(settings, self._split.in_features, self._split.out_features)

    def _build_model(self) -> nn.Module:
        model = self._build()
        if self._path is CallPath.INNER_METHOD and not hasattr(model, "compute_loss"):
            raise WrongUse(
                f"path inner_method calls model.compute_loss(inputs, targets), which {type(model).__name__} does "
                "not have. Add it, or choose another path"
            )
        if self._path is CallPath.SUBMODULES:
            check_runs_children_in_order(model, self._split.test.inputs[:2])
        # Before wrapping: what is recorded or scripted keeps the mode it was given.
        model.train(is_training(self._mode, self._world.rank))
        return model.to(self._accelerator.device)

    def _wrap(self, model: nn.Module, backend: CompileBackend) -> Subject:
        device = self._accelerator.device
        example = self._split.train[: self._config.data.batch_size][0].to(device)
        if self._spec.apply is None:
            return Subject(self._wrapper, wrap_by_target(self._config.wrapper, model, device), model)
        try:
            return apply_wrapper(
                self._wrapper,
                model,
                device=device,
                compile_backend=backend,
                example=example,
                **self._config.wrapper.ddp,
            )
        except WrapperMissing as error:
            raise WrongUse(f"wrapper={self._wrapper}: {error}") from None

    def _batches(self, first_step: int) -> Iterator[Batch]:
        return iterate_batches(
            self._split,
            batch_size=self._config.data.batch_size,
            steps=self._num_own_steps(),
            rank=0 if self._spec.same_batch else self._world.rank,
            world_size=self._world.world_size,
            seed=self._config.seed,
            device=self._accelerator.device,
            first_step=first_step,
        )

    def _train(
        self,
        subject: Subject,
        parameters: dict[str, nn.Parameter],
        bare_optimizer: torch.optim.Optimizer,
        group: dist.ProcessGroup | None,
    ) -> None:
        optimizer = subject.prepare_optimizer(bare_optimizer)
        first_step = self.report.resumed_at or 0
        batches = self._batches(first_step)
        self._offer_to_save(self._checkpoints is not None and self._config.checkpoint.every > 0)
        for self._step, batch in enumerate(batches, first_step):
            began = time.perf_counter()
            self._tell(lambda observer: observer.begin_step(self._step))
            with self._all_of(lambda observer: observer.time_step(self._step)):
                loss = self._train_step(subject, optimizer, batch)
            self._tell(lambda observer: observer.end_step(self._step))
            self.report.losses.append(loss)
            self.report.step_ms.append((time.perf_counter() - began) * 1000)
            self.report.accuracies.append(self._test_accuracy(subject, parameters))
            is_stopping = self._is_stopping(self._step + 1)
            if self._is_save_due(self._step + 1, is_stopping):
                self._save(self._step + 1, subject, bare_optimizer, group)
            if is_stopping:
                self._await_end()
        self._offer_to_save(False)

    def _offer_to_save(self, is_offered: bool) -> None:
        if self._stop is not None:
            self._stop.can_save = is_offered

    def _is_stopping(self, done: int) -> bool:
        return self._stop is not None and self._stop.can_save and self._stop.is_due(done)

    def _await_end(self) -> None:
        """Leave the rest to the guard, which was told to stop and ends this process."""
        assert self._stop is not None
        self._stop.finish()
        time.sleep(SAVE_SECONDS)

    def _is_save_due(self, done: int, is_stopping: bool) -> bool:
        """Say whether to save after so many steps: not before the timeline is kept, nor in the measured steps.

        A run that nobody observes is saved at its end too: others are compared with it.
        """
        every = self._config.checkpoint.every
        if self._checkpoints is None or every == 0:
            return False
        if not self._observe and done == self._config.steps:
            return True
        is_time = done % every == 0 or is_stopping
        return is_time and WARM_UP_STEPS < done <= self._config.steps - NUM_MEASURED

    def _save(
        self, done: int, subject: Subject, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None
    ) -> None:
        assert self._checkpoints is not None
        report = self.report
        rest = {
            "optimizer": take_settings(optimizer),
            "random": take_random_state(self._accelerator.device),
            "report": {"losses": report.losses, "step_ms": report.step_ms, "accuracies": report.accuracies},
            "probes": {name: observer.state_dict() for name, observer in self._observers.items()},
        }
        failure = self._checkpoints.save(done, take_tensors(subject.inner, optimizer), rest, group)
        if self._stop is not None and not failure:
            self._stop.saved_step = done
        if failure and self._world.rank == 0:
            warn(
                f"no checkpoint of step {done}: {failure}\nThe training goes on; the checkpoint before it stands."
            )

    def _resume(
        self, subject: Subject, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None
    ) -> dict[str, Any] | None:
        """Give the newest checkpoint that is whole to model and optimizer; return the rest of it."""
        if self._checkpoints is None or self._config.checkpoint.resume != "auto":
            return None
        saved, refused = self._checkpoints.load_newest(group)
        for message in refused if self._world.rank == 0 else ():
            warn(f"refused: {message}")
        if saved is None:
            return None
        # DDP lays its buckets anew after its first backward, which changes how sums over ranks are rounded.
        self._compute_gradients(subject, next(self._batches(0)))
        optimizer.zero_grad()
        with self._refuse_foreign():
            put_tensors(subject.inner, optimizer, saved.tensors, saved.rest["optimizer"])
        self.report.resumed_at = saved.step
        return saved.rest

    def _put_rest(self, rest: dict[str, Any] | None) -> None:
        """Give the rest of a checkpoint to the probes, the report and the random generators."""
        if rest is None:
            return
        with self._refuse_foreign():
            for name, observer in self._observers.items():
                observer.load_state_dict(rest["probes"][name])
            for name in ("losses", "step_ms", "accuracies"):
                setattr(self.report, name, rest["report"][name])
            put_random_state(rest["random"], self._accelerator.device)

    @contextmanager
    def _refuse_foreign(self) -> Generator[None]:
        """Tell a whole checkpoint that fits no trial like this one from a trial that raises."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            assert self._checkpoints is not None
            raise WrongUse(
                f"{self._checkpoints.path} holds a checkpoint of another trial, or of another version "
                f"({type(error).__name__}: {error}). Remove it to begin the trial anew"
            ) from None

    def _num_own_steps(self) -> int:
        """Return how many batches this rank has."""
        is_short = self._spec.uneven_inputs and self._world.rank == self._world.world_size - 1
        return max(1, self._config.steps - MISSING_STEPS) if is_short else self._config.steps

    def _close_missing_steps(self) -> None:
        """Close the steps that this rank had no batch for: the probes compare as many on every rank."""
        while self._observe and self._step + 1 < self._config.steps:
            self._step += 1
            self._tell(lambda observer: observer.begin_step(self._step))
            self._tell(lambda observer: observer.end_backward(None))
            self._tell(lambda observer: observer.end_step(self._step))

    def _tell(self, tell: Callable[[Observer], None]) -> None:
        for observer in self._observers.values():
            tell(observer)

    @contextmanager
    def _all_of(self, enter: Callable[[Observer], AbstractContextManager[None]]) -> Generator[None]:
        with ExitStack() as stack:
            for observer in self._observers.values():
                stack.enter_context(enter(observer))
            yield

    def _train_step(self, subject: Subject, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
        optimizer.zero_grad()
        losses = self._compute_gradients(subject, batch)
        self._tell(lambda observer: observer.end_backward(batch))
        with self._all_of(lambda observer: observer.span("optimizer")):
            optimizer.step()
        return sum(loss.item() for loss in losses)

    def _compute_gradients(self, subject: Subject, batch: Batch) -> list[Tensor]:
        parts = split_batch(self._window, batch)
        losses = []
        for window, part in parts:
            with enter_forward_window(window, subject.wrapped, part), self._enter_mode():
                loss = self._invoke(subject.wrapped, subject.inner, part, self._loss)
            loss = loss / len(parts) if len(parts) > 1 else loss
            if loss.requires_grad:
                timed = self._all_of(lambda observer: observer.span("backward"))
                with enter_backward_window(window, subject.wrapped), timed:
                    loss.backward()
            losses.append(loss.detach())
        return losses

    def _test_accuracy(self, subject: Subject, parameters: dict[str, nn.Parameter]) -> float | None:
        """Test this rank's model after some steps; None after the others, and where it holds no whole model."""
        every = self._config.probes.accuracy_every
        if not self._observe or every == 0 or (self._step % every and self._step + 1 < self._config.steps):
            return None
        if any(is_sharded(subject, parameter) for parameter in parameters.values()):
            return None
        assert self._examiner is not None
        return self._examiner.examine(local_state(subject, parameters)).accuracy

    def _enter_mode(self) -> AbstractContextManager[Any]:
        return enter_mode(self._mode, self._accelerator.device)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self._tell(lambda observer: observer.note_result(outputs))
        return self._loss_function(outputs, targets)

    def _compare_parameters(self, flat: Tensor, group: dist.ProcessGroup | None, reference: Tensor | None) -> None:
        of_rank_0 = flat.clone()
        if group is not None:
            dist.broadcast(of_rank_0, src=0, group=group)
        self.report.parameters = flat
        self.report.spread = _relative_distance(flat, of_rank_0)
        if reference is not None:
            self.report.distance = _relative_distance(flat, reference)


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters.

    Raises:
        WrongUse: Unknown name, or a `_target_` that is none or does not take what is set.
    """
    options = {name: getattr(config, name) for name in ("lr", "momentum", "weight_decay")}
    options = {name: value for name, value in options.items() if value is not None}
    if config._target_:  # pyright: ignore[reportPrivateUsage]
        build = load_target("optimizer", own_arguments(config), ("params", *options))
        return build(params=parameters, **options)
    if config.name not in OPTIMIZERS:
        raise WrongUse(f"optimizer.name={config.name} is unknown; write one of: {', '.join(OPTIMIZERS)}")
    if config.name != "sgd":
        options.pop("momentum", None)
    return OPTIMIZERS[config.name](parameters, **options)


def check_runs_children_in_order(model: nn.Module, inputs: Tensor) -> None:
    """Refuse the path `submodules` for models whose forward is not the chain of their children.

    Raises:
        WrongUse: The chain raises or gives another result.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected, outputs = model(inputs), inputs
            for child in model.children():
                outputs = child(outputs)
        same = torch.equal(outputs, expected)
    except Exception:
        same = False
    model.train(training)
    if not same:
        raise WrongUse(
            f"path submodules calls the children one after the other, which is not what {type(model).__name__}"
            ".forward computes. Choose another path, or a model that runs its children in order"
        )


def _relative_distance(parameters: Tensor, reference: Tensor) -> float:
    return ((parameters - reference).norm() / reference.norm()).item()
