"""The typed configuration: types and defaults live here, choices in `conf/` and in the code's own lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from ddpcall.verdicts import VERDICTS

# Nodes in which a user's `_target_` may stand, with its arguments beside it.
OPEN_NODES = ("wrapper", "path", "data", "optimizer")


@dataclass(kw_only=True)
class WrapperConfig:
    """How the model is prepared.

    Attributes:
        name: One of `ddpcall.wrappers.WRAPPERS`.
        compile_backend: torch.compile's backend, for the compiling wrappers.
        ddp: Keyword arguments for DDP's constructor, such as `{static_graph: true}`.
        _target_: A function of the user's, which takes `model` and returns it wrapped: the wrapper `custom`.
    """

    _target_: str | None = None
    name: str = ""
    compile_backend: str = "eager"
    ddp: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class PathConfig:
    """How the model is reached.

    Attributes:
        name: A `ddpcall.paths.CallPath`.
        _target_: A function of the user's, which returns the loss of a batch: the call path `custom`. It takes any
            of `wrapped`, `inner`, `inputs`, `targets` and `loss`.
    """

    _target_: str | None = None
    name: str = ""


@dataclass(kw_only=True)
class DataConfig:
    """What the model is trained on.

    Attributes:
        name: digits or regression.
        batch_size: Samples per rank and step.
        test_fraction: Share of the samples kept for the test set, the same on every rank.
        num_samples: Size of the synthetic data; digits has 1,797.
        noise: Standard deviation of the synthetic targets' noise.
        _target_: A function or class of the user's, for data of their own: a pair of tensors, or a dataset of
            such pairs.
    """

    _target_: str | None = None
    name: str = ""
    batch_size: int = 32
    test_fraction: float = 0.2
    num_samples: int = 2048
    noise: float = 0.1


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer: `name` is sgd or adamw, or `_target_` a class. What is null is left to torch's default."""

    _target_: str | None = None
    name: str = ""
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None


@dataclass(kw_only=True)
class LoggerConfig:
    """Where a trial's curves go beside TensorBoard's files: `name` is none, wandb (offline) or mlflow (local)."""

    name: str = "none"


@dataclass(kw_only=True)
class CellConfig:
    """One cell, or those that agree with it: an axis that is null has every value that the grid gives it."""

    wrapper: str | None = None
    path: str | None = None
    window: str | None = None
    hooks: str | None = None
    mode: str | None = None
    model: str | None = None


@dataclass(kw_only=True)
class GridConfig:
    """The axes of an experiment; an empty axis means the one value chosen outside the grid.

    Attributes:
        wrapper: Names of wrappers.
        path: Names of call paths.
        window: Names of sync windows.
        hooks: `early` and `late`.
        mode: Names of modes.
        model: Import paths of models, as for `model._target_`.
        cells: Cells named one by one, where the axes are not to be crossed; each is crossed with the axes that it
            does not name.
    """

    wrapper: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    window: list[str] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)
    mode: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    cells: list[CellConfig] = field(default_factory=list)


@dataclass(kw_only=True)
class ProbesConfig:
    """Which probes run.

    Attributes:
        enabled: False runs the bare trials: losses and consequences only.
        hook_steps: The hooks probe observes this many steps and then leaves, since it is the dear one; 0: all.
            On compiled models it always stays: leaving would recompile them.
        global_hooks: Also count hooks registered for all modules at once.
        mixing: Measure in the last two steps whose gradients each rank's optimizer uses.
        modes: Also watch training flags, dropout, batch norm and precision; not on compiled models.
        timeline: Record what happens when in one step, after warm-up.
        accuracy_every: Test each rank's model after every so many steps, the first and the last; 0: never.
    """

    enabled: bool = True
    hook_steps: int = 20
    global_hooks: bool = False
    mixing: bool = True
    modes: bool = False
    timeline: bool = True
    accuracy_every: int = 10


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving and resuming (docs/checkpoints.md).

    Attributes:
        every: Save the trial that runs after every so many steps; 0: never.
        resume: `auto` goes on with what the run directory holds: finished trials stand, and the one that was cut
            goes on from its newest checkpoint that is whole. `never` begins anew.
        keep: How many checkpoints of the trial that runs are kept.
    """

    every: int = 0
    resume: str = "never"
    keep: int = 2


def _add_verdicts(kind: type[Any]) -> type[Any]:
    """Give a class that is to be a dataclass a field for every verdict."""
    for name in VERDICTS:
        kind.__annotations__[name] = "str | None"
        setattr(kind, name, None)
    return kind


@dataclass(kw_only=True)
@_add_verdicts
class ExpectationConfig(CellConfig):
    """What the verdicts of the cells that match should be; null matches any cell, or expects nothing.

    `torch` matches the beginning of torch's version, such as "2.13", `device` the kind of device; the other
    selectors match a cell's axes. Every verdict can be expected, by its name.
    """

    torch: str | None = None
    device: str | None = None


@dataclass(kw_only=True)
class OneProcessConfig:
    """One comparison with one process, and what it should find.

    Attributes:
        case: A case of `ddpcall.lab.one_process_cases`.
        wrapper: What wraps the model; null: what the case names.
        expect: The cause: one of `ddpcall.compare.CAUSES`.
    """

    case: str = MISSING
    wrapper: str | None = None
    expect: str = MISSING


@dataclass(kw_only=True)
class TrainConfig:
    """One experiment: a grid of trials, the same data and seed for all of them, and what they should show.

    With `one_process` it is a list of comparisons with one process instead, each with a model and a batch of its
    own: `ranks`, `steps` and `optimizer` hold for them; what else makes trials (grid, data, probes) does not.

    Attributes:
        name: The experiment's name; names its run directory.
        question: The question it answers, in one sentence.
        ranks: How many ranks it needs; missing ones are started on this machine.
        steps: Optimizer steps a trial.
        seed: Seed of initial parameters, data order and noise.
        device: auto, cpu or cuda.
        backend: auto, gloo or nccl.
        trial_timeout_s: A trial that takes longer, in seconds, is cut and reported with every rank's stack.
        tensorboard: Whether to write TensorBoard events.
        logger: Where the same curves go too.
        report: Whether to write report.html at the end.
        checkpoint: Whether and how trials are saved and resumed.
        one_process: Comparisons with one process, in place of a grid of trials.
        loss: `_target_`, a function of outputs and targets or a class of such, and its arguments; empty: cross
            entropy for integer targets, mean squared error for real ones.
    """

    name: str = "train"
    question: str = "What does this way of calling the model lose?"
    ranks: int = 2
    steps: int = 60
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    trial_timeout_s: float = 120.0
    tensorboard: bool = True
    report: bool = True
    wrapper: WrapperConfig = field(default_factory=WrapperConfig)
    path: PathConfig = field(default_factory=PathConfig)
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: dict[str, Any] = field(default_factory=dict)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    expect: list[ExpectationConfig] = field(default_factory=list)
    one_process: list[OneProcessConfig] = field(default_factory=list)


def register_schema() -> None:
    """Put the schema where `conf/train.yaml` finds it by the name `schema`, and the options that are mere names.

    These come from the code's own lists, which imports torch. Options that say more are files in `conf/`.
    """
    from ddpcall.lab.data import DATA
    from ddpcall.lab.loggers import LOGGERS
    from ddpcall.paths import CallPath
    from ddpcall.wrappers import WRAPPERS

    store = ConfigStore.instance()
    schema = OmegaConf.structured(TrainConfig)
    for node in (*OPEN_NODES, "model", "loss"):
        OmegaConf.set_struct(schema[node], False)
    store.store(name="schema", node=schema)
    for group, names in {"wrapper": WRAPPERS, "path": CallPath, "data": DATA, "logger": LOGGERS}.items():
        for name in names:
            if name != "custom":  # which is chosen by its `_target_`
                store.store(group=group, name=str(name), node={"name": str(name)})
