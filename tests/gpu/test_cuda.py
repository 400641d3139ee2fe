"""The same experiments on CUDA, where there is one; the verdicts must not depend on the device."""

import pytest
import torch

from tests.ranks.lab_process import run_lab

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs a GPU for each of two ranks")
OPTIONS = ("experiment=forward_bypass", "steps=10", "tensorboard=false")


@needs_gpu
def test_ranks_that_share_a_gpu_use_gloo_and_give_the_same_verdicts(tmp_path):
    run = run_lab(tmp_path, *OPTIONS, "device=cuda", "backend=gloo", ranks=2)
    assert run.code == 0, run.err
    assert run.summary()["environment"]["device"] == "cuda"


@needs_two_gpus
def test_a_gpu_for_each_rank_means_nccl(tmp_path):
    run = run_lab(tmp_path, *OPTIONS, ranks=2)
    assert run.code == 0, run.err
    assert run.summary()["environment"]["backend"] == "nccl"
    assert all(trial["flight_recorder_agrees"] in (True, None) for trial in run.summary()["trials"])


@needs_gpu
@pytest.mark.parametrize("name", ["compile_bypass", "hooks_bypass"])
def test_the_other_experiments_hold_on_a_gpu(tmp_path, name):
    run = run_lab(tmp_path, f"experiment={name}", "device=cuda", "steps=3", "tensorboard=false")
    assert run.code == 0, run.err
