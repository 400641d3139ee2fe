"""Evidence: frozen records of what a trial was measured to do. Facts only; opinions live in `verdicts`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where the facts were measured; they change with every one of these.

    Attributes:
        torch: torch's version, with its build suffix.
        python: The interpreter's version.
        backend: The process group's backend: gloo or nccl.
        device: cpu or cuda.
        device_name: The accelerator's name, or the processor's architecture.
        world_size: Number of ranks.
        versions: Versions of the other packages a result can depend on.
    """

    torch: str
    python: str
    backend: str
    device: str
    device_name: str
    world_size: int
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The coordinates of one trial in its experiment's grid.

    Attributes:
        wrapper: How the model was prepared.
        path: How it was reached.
        window: What stood around the call: arming forwards and `no_sync`.
        hooks: `early` (registered before the first step) or `late` (after it).
        mode: train or eval, gradients on or off, precision, seeds.
        model: Name of the model.
    """

    wrapper: str
    path: str
    window: str = "plain"
    hooks: str = "early"
    mode: str = "train"
    model: str = ""

    def label(self) -> str:
        """Return a short name: wrapper × path, and the other coordinates where they are not the default."""
        parts = [self.wrapper, self.path]
        parts += [self.window] if self.window != "plain" else []
        parts += [f"{self.hooks} hooks"] if self.hooks != "early" else []
        parts += [self.mode] if self.mode != "train" else []
        return " × ".join(parts)


AXES = tuple(field.name for field in fields(Cell))


@dataclass(frozen=True, kw_only=True)
class HookCount:
    """What happened to one kind of hook on one module.

    Attributes:
        role: wrapped, inner or submodules; one module has several roles where the wrapper works in place.
        module: Qualified name below the inner module; empty for the root.
        kind: forward_pre, forward, full_backward, or the same with `global_` in front.
        registered: Hooks of this kind on the module, ours included.
        fired: Times our counting hook fired.
        forwards: Times the module's forward ran while the hook was registered; for backward hooks, only
            forwards whose output required a gradient.
    """

    role: str
    module: str
    kind: str
    registered: int
    fired: int
    forwards: int


@dataclass(frozen=True, kw_only=True)
class ReducerEvidence:
    """What DDP's reducer did, by step. All lists have one entry a step.

    Attributes:
        reducers: DDP reducers that owned the model's parameters at the end of the trial.
        armings: Grad-enabled `DDP.forward` that prepared the reducer for a backward.
        arrivals_armed: Gradients that arrived while the reducer expected them.
        arrivals_unarmed: Gradients that arrived while it did not: nobody will reduce them.
        logged_iteration: DDP's own iteration counter, as last logged; sampled, so it may lag. A trial that was
            resumed has a new DDP, which counts anew.
        logged_buckets: Buckets in the last logged reduction; None when none was.
    """

    reducers: int
    armings: tuple[int, ...]
    arrivals_armed: tuple[int, ...]
    arrivals_unarmed: tuple[int, ...]
    logged_iteration: int | None = None
    logged_buckets: int | None = None


@dataclass(frozen=True, kw_only=True)
class CollectiveEvidence:
    """An independent count: the collectives that torch's flight recorder saw on the trial's process group.

    Attributes:
        all_reduces: All-reduces by step; None for steps that had left the recorder's ring buffer.
        agrees: Whether a step had all-reduces exactly when the reducer probe saw armed gradients arrive; None
            where the wrapper reduces in a way that probe does not know.
    """

    all_reduces: tuple[int | None, ...]
    agrees: bool | None


@dataclass(frozen=True, kw_only=True)
class GradientEvidence:
    """How far the ranks' gradients lay apart, before the optimizer stepped.

    Attributes:
        max_difference: By step: largest absolute difference between two ranks, over all parameters.
        max_magnitude: By step: largest absolute gradient on any rank, of those that are finite.
        parameters: Over all steps: largest absolute difference of each parameter that differed.
        sharded: Names of the parameters whose gradient is spread over the ranks; they are not compared.
        with_gradient: Number of parameters that received a gradient in the last step.
        without_gradient: Names of those that received none.
        batches_differ: Whether the ranks had different batches in every step (else equality proves nothing).
    """

    max_difference: tuple[float, ...]
    max_magnitude: tuple[float, ...]
    parameters: dict[str, float]
    with_gradient: int
    without_gradient: tuple[str, ...]
    batches_differ: bool
    sharded: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MixingEvidence:
    """Who learned from whom: W in `used_i = Σ W[i, j] own_j`, measured in a trial's last steps.

    Attributes:
        steps: Numbers of the measured steps, from 0.
        shapes: By measured step: one of `ddpcall.mixing.SHAPES`.
        step: The step that the rest is about: the first that was not averaged, or else the last.
        matrix: By rank: how much of each column is in the gradient that it used; None: the step does not tell.
        ranks: The matrix's rows: ranks that took the step.
        columns: Rank and backward of each column; backwards that are mixed alike are one, negative ones belong to
            the step before.
        scale: 1.0 where every rank used exactly the mean; None where that means nothing.
        residual: By row: what the matrix does not explain, relative to the gradients that were mixed.
        by_parameter: Parameters' names by shape.
        reason: What the shape's name does not say.
        explanation: The same in sentences.
    """

    steps: tuple[int, ...]
    shapes: tuple[str, ...]
    step: int
    matrix: tuple[tuple[float | None, ...], ...]
    ranks: tuple[int, ...]
    columns: tuple[tuple[int, int], ...]
    scale: float | None
    residual: tuple[float | None, ...]
    by_parameter: dict[str, tuple[str, ...]]
    reason: str
    explanation: str


@dataclass(frozen=True, kw_only=True)
class ReplicaEvidence:
    """Whether the replicas stayed one model, by digests taken after each optimizer step.

    Attributes:
        first_step_parameters: First step (from 0) after which parameters differed between ranks; None: never.
        first_step_buffers: The same for buffers.
        parameters: Names of the parameters that differed at the end.
        buffers: Names of the buffers that differed at the end.
        initial_digest: xxh3_64 of the parameters and buffers before the first step, in hex.
    """

    first_step_parameters: int | None
    first_step_buffers: int | None
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    initial_digest: str


@dataclass(frozen=True, kw_only=True)
class CompiledEvidence:
    """What torch.compile did.

    Attributes:
        requested: Whether the wrapper compiles anything.
        frames: Frames that dynamo compiled during the trial.
        calls_compiled: Steps in which a compiled graph ran.
        calls_eager: Steps in which none did.
    """

    requested: bool
    frames: int
    calls_compiled: int
    calls_eager: int


@dataclass(frozen=True, kw_only=True)
class ModesEvidence:
    """What depends on modes, buffers and random numbers. Lists by step have one entry a step.

    Attributes:
        training_modules: By rank: modules of the inner model in train mode in the last step.
        num_modules: Modules of the inner model.
        flags_differ: Names of the modules whose training flag differed between ranks in some step.
        dropout_kept: By step: share of the values that dropout kept on this rank; None where none ran.
        masks_identical: By step: whether all ranks dropped the same positions; None where nothing was dropped.
            Positions where a rank's input was zero already tell nothing and are left out.
        statistics_difference: By step: largest absolute difference of batch norm's running statistics between
            two ranks, after the step; None without such statistics.
        batches_tracked: By step: the first batch norm's `num_batches_tracked` on this rank.
        running_mean_norm: By step: L2 norm of all running means on this rank; None without such statistics.
        running_var_norm: The same of the running variances.
        compute_dtypes: Dtypes that left linear layers and convolutions in the steps, on this rank.
        result_dtype: Dtype of what the call path handed to the loss; empty where it computed the loss itself.
        evaluation_inner: Largest absolute difference between ranks of `inner(x)` in eval mode, for one batch;
            None without running statistics, where inner and wrapped are one object, or where it raised.
        evaluation_wrapped: The same of `wrapped(x)`, run after it.
    """

    training_modules: tuple[int, ...]
    num_modules: int
    flags_differ: tuple[str, ...]
    dropout_kept: tuple[float | None, ...]
    masks_identical: tuple[bool | None, ...]
    statistics_difference: tuple[float | None, ...]
    batches_tracked: tuple[int | None, ...]
    compute_dtypes: tuple[str, ...]
    result_dtype: str
    evaluation_inner: float | None = None
    evaluation_wrapped: float | None = None
    running_mean_norm: tuple[float | None, ...] = ()
    running_var_norm: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TimelineEvent:
    """Something that was seen to begin and to end in one step on one rank.

    Attributes:
        kind: pre_hook, forward, hook, backward, bucket, collective or optimizer.
        name: Of a root its class, of a module below it its qualified name; a hook's kind and its module; the
            operation of a bucket or of another collective.
        owner: wrapped, inner or submodule; None where no module is meant.
        start_us: Microseconds since the step began on this rank.
        end_us: Likewise.
        detail: A module's class, the hook's function, a collective's bytes, what was raised.
    """

    kind: str
    name: str
    start_us: float
    end_us: float
    owner: str | None = None
    detail: str | None = None


@dataclass(frozen=True, kw_only=True)
class HooksOfStep:
    """What the hooks of one kind on one module did in one step.

    Attributes:
        kind: forward_pre, forward or full_backward.
        name: The name that their events have in the timeline.
        module: The name that the module's forward has there.
        owner: wrapped, inner or submodule.
        functions: Names of the registered functions, in the order they run in.
        fired: Times our counting hook among them fired.
        forwards: Times the module's forward ran to its end; for backward hooks, only with an output that
            required a gradient.
    """

    kind: str
    name: str
    module: str
    owner: str
    functions: tuple[str, ...]
    fired: int
    forwards: int

    @property
    def event_kind(self) -> str:
        """Return the kind that their events have in the timeline."""
        return "pre_hook" if self.kind == "forward_pre" else "hook"


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """One step of one trial on one rank: what was seen, and the counts that tell what was not.

    Attributes:
        step: The step, from 0.
        events: In the order in which they began; a nested event lies inside its parent's span. Collectives run
            beside the Python code and nest in nothing but the step.
        hooks: What the counted hooks did in this step.
        raised: Whether the step ended in an exception.
        arrivals: Gradients that arrived in the step while a reducer expected them, and while none did; None
            where the wrapper has no reducer that the taps know, or the step did not get so far.
        compiled_runs: Compiled graphs that ran in the step; None where nothing was to be compiled.
        with_gradient: Parameters of the optimizer that had a gradient after the backward; None: no backward.
    """

    step: int
    events: tuple[TimelineEvent, ...]
    hooks: tuple[HooksOfStep, ...] = ()
    raised: bool = False
    arrivals: tuple[int, int] | None = None
    compiled_runs: int | None = None
    with_gradient: int | None = None


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Something that calling the wrapped object does in a step, and that this step went past.

    Attributes:
        kind: pre_hook, forward, hook, bucket or optimizer, as for `TimelineEvent`.
        name: Likewise.
        owner: Likewise.
        detail: The counts that tell.
    """

    kind: str
    name: str
    owner: str | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Consequence:
    """How good the trained models are. Lists have one entry a rank.

    Attributes:
        test_loss: Mean loss on the same test set.
        test_accuracy: Share of the test set classified correctly; None for regression.
        distance: L2 distance of the parameters from those of the synchronized run (plain DDP, `wrapped(x)`,
            same data and seed), divided by the norm of the latter; None where no such run was made.
        spread: Largest L2 distance between two ranks' parameters, divided by the norm of rank 0's.
        digest: xxh3_64 of the parameters and buffers after the last step, in hex.
    """

    test_loss: tuple[float, ...]
    test_accuracy: tuple[float, ...] | None
    distance: tuple[float, ...] | None
    spread: float
    digest: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An exception that a trial raised on one rank.

    Attributes:
        rank: The rank that raised.
        step: The step (from 0) it happened in; -1 while the model was built or wrapped.
        kind: The exception's class.
        message: Its message.
        traceback: The whole traceback, as text.
        seconds: When, in seconds since the trial began on that rank: the earliest is nearest the cause.
    """

    rank: int
    step: int
    kind: str
    message: str
    traceback: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that was measured in one trial. Parts that could not be measured are None.

    Attributes:
        cell: Where in the grid.
        environment: Where measured.
        seed: The seed of initial parameters and data order.
        steps: Optimizer steps asked for.
        step_ms: Median wall-clock time of a step on rank 0, milliseconds, probes included.
        data_parallel: Whether the wrapper is there to train one model on the data of several ranks. Declared and
            not measured: such a wrapper that was bypassed looks like one that never was.
        failures: Exceptions, nearest the cause first; empty when the trial ran to its end.
    """

    cell: Cell
    environment: Environment
    seed: int
    steps: int
    data_parallel: bool = True
    step_ms: float | None = None
    failures: tuple[Failure, ...] = ()
    hooks: tuple[HookCount, ...] | None = None
    reducer: ReducerEvidence | None = None
    collectives: CollectiveEvidence | None = None
    gradients: GradientEvidence | None = None
    mixing: MixingEvidence | None = None
    replicas: ReplicaEvidence | None = None
    compiled: CompiledEvidence | None = None
    modes: ModesEvidence | None = None
    consequence: Consequence | None = None
