"""A trial's curves in loggers of the user's, each with its own library where that is installed."""

import importlib.util

import pytest

from ddpcall.evidence import Cell
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.loggers import LOGGERS, check_logger, list_scalars, log_curves
from ddpcall.lab.rank_report import RankReport
from tests.report.made import make_evidence

EVIDENCE = make_evidence(Cell(wrapper="ddp", path="inner_call", model="my.Mlp"))
REPORTS = [
    RankReport(
        losses=[0.5, 0.25],
        step_ms=[1, 1],
        accuracies=[None, 0.75],
        columns={"distance_to_rank0": [0.0, 0.125 * rank]},
    )
    for rank in (0, 1)
]


def test_every_rank_has_its_curves_and_what_was_not_measured_has_no_point():
    scalars = list(list_scalars(EVIDENCE, REPORTS))
    assert ("loss/rank0", 0.5, 0) in scalars
    assert [(value, step) for tag, value, step in scalars if tag == "test_accuracy/rank1"] == [(0.75, 1)]
    assert ("distance_to_rank0/rank1", 0.125, 1) in scalars
    assert [value for tag, value, _ in scalars if tag == "gradients/max_difference"] == [0.5] * 6


@pytest.mark.parametrize("name", [name for name in LOGGERS if name != "none"])
def test_a_logger_that_is_not_installed_says_what_to_install(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(WrongUse, match=rf"logger={name} needs {name}.* pip install 'ddpcall\[{name}\]'"):
        check_logger(name)
    check_logger("none")


def test_an_unknown_logger_is_refused_with_the_known_ones():
    with pytest.raises(WrongUse, match="write one of: none, wandb, mlflow"):
        check_logger("neptune")


@pytest.mark.filterwarnings("default")  # the library's own are not ours
def test_mlflow_has_the_curves_in_a_store_in_the_run_directory(tmp_path):
    pytest.importorskip("mlflow", reason="write: pip install 'ddpcall[mlflow]'")
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    log_curves("mlflow", tmp_path, EVIDENCE, REPORTS)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("ddpcall")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["path"] == "inner_call"
    assert [(m.value, m.step) for m in client.get_metric_history(run.info.run_id, "loss/rank1")] == [
        (0.5, 0),
        (0.25, 1),
    ]


@pytest.mark.filterwarnings("default")
def test_wandb_writes_offline_into_the_run_directory(tmp_path):
    pytest.importorskip("wandb", reason="write: pip install 'ddpcall[wandb]'")
    log_curves("wandb", tmp_path, EVIDENCE, REPORTS)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"distance_to_rank0/rank1" in record.read_bytes()
