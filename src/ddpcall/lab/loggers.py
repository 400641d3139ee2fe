"""A trial's curves for loggers of the user's: Weights & Biases offline, MLflow with a local store."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ddpcall.evidence import Cell, Evidence
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.rank_report import RankReport

LOGGERS = ("none", "wandb", "mlflow")
PROJECT = "ddpcall"
MODES = ("dropout_kept", "statistics_difference", "batches_tracked")
MLFLOW_STORE = "mlflow.db"


def check_logger(name: str) -> None:
    """Refuse a logger that is unknown or not installed.

    Raises:
        WrongUse: With what to write or install.
    """
    if name not in LOGGERS:
        raise WrongUse(f"logger.name={name} is unknown; write one of: {', '.join(LOGGERS)}")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise WrongUse(f"logger={name} needs {name}, which is not installed. Write: pip install 'ddpcall[{name}]'")


def log_curves(name: str, directory: Path, evidence: Evidence, reports: Sequence[RankReport]) -> None:
    """Write the curves of one trial into the run directory; nothing is sent anywhere.

    Args:
        name: One of `LOGGERS`.
        directory: The run directory; wandb's folder is `wandb` in it, MLflow's store `mlflow.db`.
        evidence: The trial's evidence; its cell becomes the run's configuration.
        reports: The ranks' reports.
    """
    match name:
        case "wandb":
            _log_wandb(directory, evidence.cell, list_scalars(evidence, reports))
        case "mlflow":
            _log_mlflow(directory, evidence.cell, list_scalars(evidence, reports))
        case _:
            pass  # none


def name_cell(cell: Cell) -> str:
    """Return a cell's name for a logger: all its coordinates."""
    return "-".join([cell.model.rsplit(".", 1)[-1], cell.wrapper, cell.path, cell.window, cell.hooks, cell.mode])


def list_scalars(evidence: Evidence, reports: Sequence[RankReport]) -> Iterator[tuple[str, float, int]]:
    """Yield tag, value and step of every curve, and last how far the gradients lay apart."""
    for rank, report in enumerate(reports):
        columns: dict[str, Sequence[float | None]] = {
            "loss": report.losses,
            "test_accuracy": report.accuracies,
            "distance_to_rank0": report.columns.get("distance_to_rank0", ()),
        }
        columns |= {f"modes/{name}": report.columns.get(name, ()) for name in MODES}
        for tag, values in columns.items():
            yield from (
                (f"{tag}/rank{rank}", value, step) for step, value in enumerate(values) if value is not None
            )
        end = len(report.losses)
        for number in report.columns.get("training_modules", ())[-1:]:
            yield f"modes/training_modules/rank{rank}", number or 0, end
        if report.test_accuracy is not None and not any(report.accuracies):
            yield f"test_accuracy/rank{rank}", report.test_accuracy, end
    if evidence.gradients is not None:
        for step, difference in enumerate(evidence.gradients.max_difference):
            yield "gradients/max_difference", difference, step


def _log_wandb(directory: Path, cell: Cell, scalars: Iterator[tuple[str, float, int]]) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    by_step: dict[int, dict[str, float]] = {}
    for tag, value, step in scalars:
        by_step.setdefault(step, {})[tag] = value
    with wandb.init(
        project=PROJECT,
        name=name_cell(cell),
        config=dataclasses.asdict(cell),
        dir=directory,
        mode="offline",
        settings=wandb.Settings(silent=True),
    ) as run:
        for step in sorted(by_step):  # wandb drops what is logged for an earlier step
            run.log(by_step[step], step=step)
    wandb.teardown()  # its own process writes the file, and is not waited for otherwise


def _log_mlflow(directory: Path, cell: Cell, scalars: Iterator[tuple[str, float, int]]) -> None:
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    client = MlflowClient(tracking_uri=f"sqlite:///{(directory / MLFLOW_STORE).absolute()}")
    known = client.get_experiment_by_name(PROJECT)
    experiment = known.experiment_id if known is not None else client.create_experiment(PROJECT)
    run = client.create_run(experiment, run_name=name_cell(cell)).info.run_id
    now = int(time.time() * 1000)
    metrics = [Metric(tag, float(value), now, step) for tag, value, step in scalars]
    params = [Param(name, str(value)) for name, value in dataclasses.asdict(cell).items()]
    for begin in range(0, max(len(metrics), 1), 1000):  # MLflow takes 1,000 a call
        client.log_batch(run, metrics[begin : begin + 1000], params if begin == 0 else [])
    client.set_terminated(run)
