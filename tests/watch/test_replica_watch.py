"""Replicas compared on two ranks: what differs is found and named, equal replicas are silent."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall

pytestmark = pytest.mark.ranks(2, timeout=120)


class Run:
    """Trains a few steps under a watch; a test changes something on one rank in between."""

    def __init__(self, rank, tmp_path, model=None, lr=0.1):
        self.rank = rank.rank
        self.barrier = rank.barrier
        self.session = ddpcall.watch(on_finding="record", json=tmp_path / "f.json")
        torch.manual_seed(0)
        self.ddp = DistributedDataParallel(model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=lr)
        torch.manual_seed(self.rank)

    def train(self, steps=1, batch=None):
        for _ in range(steps):
            outputs = self.ddp(torch.randn(3, 4) if batch is None else batch)
            self.optimizer.zero_grad()
            outputs.square().mean().backward()
            self.optimizer.step()
        return self

    def findings(self):
        """End the watch on both ranks; rank 0 has found what there is."""
        self.session.close()
        self.barrier()
        return [(f.code, f.line, f.parameters) for f in self.session.all_findings()]


def line(test):
    source, first = inspect.getsourcelines(test)
    (found,) = [first + offset for offset, text in enumerate(source) if text.rstrip().endswith("# here")]
    return found


def test_equal_replicas_are_silent(rank, tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    run = Run(rank, tmp_path, model).train(3)
    if run.rank == 0:
        run.ddp.eval()
        run.ddp.train()
    assert run.train(2).findings() == []


def test_a_parameter_changed_on_one_rank_is_named(rank, tmp_path):
    run = Run(rank, tmp_path).train(2)
    if run.rank == 1:
        with torch.no_grad():
            run.ddp.module[2].bias.add_(1)
    found = run.train(1).findings()
    # The gradients that follow differ through the changed bias only where it is used: in its own layer's outputs.
    assert [code for code, _, _ in found] == ["DC201"]
    assert "2.bias" in found[0][2]


def test_loading_on_one_rank_is_found_on_its_line(rank, tmp_path):
    run = Run(rank, tmp_path).train(1)
    if run.rank == 1:
        state = {name: value + 1 for name, value in run.ddp.module.state_dict().items()}
        run.ddp.module.load_state_dict(state)  # here
    found = run.train(2).findings()
    expected = line(test_loading_on_one_rank_is_found_on_its_line)
    assert [(code, where) for code, where, _ in found] == [("DC202", expected)]


def test_loading_on_all_ranks_is_silent(rank, tmp_path):
    run = Run(rank, tmp_path).train(1)
    run.ddp.module.load_state_dict(run.ddp.module.state_dict())
    assert run.train(2).findings() == []


def test_a_rate_per_rank_is_found_where_the_optimizer_was_made(rank, tmp_path):
    found = Run(rank, tmp_path, lr=0.1 * (1 + rank.rank)).train(3).findings()
    source, first = inspect.getsourcelines(Run.__init__)
    (made,) = [first + offset for offset, text in enumerate(source) if "torch.optim.SGD" in text]
    assert [(code, where) for code, where, _ in found] == [("DC203", made)]


def test_a_rank_left_in_eval_mode_is_found_where_it_was_switched(rank, tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    run = Run(rank, tmp_path, model).train(2)
    if run.rank == 0:
        run.ddp.module.eval()  # here
    found = run.train(2).findings()
    assert found == [("DC204", line(test_a_rank_left_in_eval_mode_is_found_where_it_was_switched), ("1",))]


def test_a_mode_that_nothing_depends_on_is_silent(rank, tmp_path):
    run = Run(rank, tmp_path).train(2)
    if run.rank == 0:
        run.ddp.module.eval()
    assert run.train(2).findings() == []


def batch_norm():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_statistics_that_differ_are_found_where_the_inner_model_is_evaluated(rank, tmp_path):
    run = Run(rank, tmp_path, batch_norm()).train(3)
    run.ddp.eval()
    with torch.no_grad():
        run.ddp.module(torch.ones(2, 4))  # here
    run.ddp.train()
    found = run.findings()
    expected = line(test_statistics_that_differ_are_found_where_the_inner_model_is_evaluated)
    assert [(code, where) for code, where, _ in found] == [("DC205", expected)]


def test_evaluating_through_the_wrapper_broadcasts_them_and_is_silent(rank, tmp_path):
    run = Run(rank, tmp_path, batch_norm()).train(3)
    run.ddp.eval()
    with torch.no_grad():
        run.ddp(torch.ones(2, 4))
        run.ddp.module(torch.ones(2, 4))
    run.ddp.train()
    assert run.findings() == []


def test_the_same_batch_everywhere_is_found_at_the_forward(rank, tmp_path):
    found = Run(rank, tmp_path).train(3, torch.ones(3, 4)).findings()
    source, first = inspect.getsourcelines(Run.train)
    (forward,) = [first + offset for offset, text in enumerate(source) if "self.ddp(" in text]
    assert [(code, where) for code, where, _ in found] == [("DC206", forward)]


@pytest.mark.parametrize("drops", [True, False])
def test_the_same_seed_is_a_note_if_masks_are_drawn(rank, tmp_path, drops):
    run = Run(rank, tmp_path, nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5 if drops else 0.0), nn.Linear(8, 2)))
    torch.manual_seed(0)
    found = run.train(3, torch.ones(3, 4) + run.rank).findings()
    assert [code for code, _, _ in found] == (["DC207"] if drops else [])


def test_what_a_bypass_explains_is_not_said_twice(rank, tmp_path):
    run = Run(rank, tmp_path)
    for _ in range(3):
        run.ddp.module(torch.randn(3, 4)).square().mean().backward()
        run.optimizer.step()
    assert [code for code, _, _ in run.findings()] == ["DC101"]
