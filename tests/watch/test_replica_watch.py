"""Replicas compared on two ranks: what differs is found and named, equal replicas are silent."""

import copy
import inspect
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ddpcall
from ddpcall.watch.compare.exchange import Exchange

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


def test_a_difference_that_is_gone_when_it_is_asked_about_is_silent(rank, tmp_path):
    run = Run(rank, tmp_path).train(2)
    if run.rank == 1:
        with torch.no_grad():
            run.ddp.module[2].bias.add_(1)
    run.train(1)
    with torch.no_grad():
        for parameter in run.ddp.parameters():
            dist.broadcast(parameter, 0)
    assert run.train(3).findings() == []


def test_a_small_difference_is_judged_at_the_end_also_where_the_first_answer_is_read_only_then(
    rank, tmp_path, monkeypatch
):
    """A first answer puts a doubtful difference off to a later step; there may be none."""
    finished = []
    compare, details = Exchange.compare, Exchange.details
    monkeypatch.setattr(
        Exchange, "compare", lambda self, *args, **kw: (finished.append(1), compare(self, *args, **kw))[1]
    )
    monkeypatch.setattr(Exchange, "details", lambda self, **kw: details(self, **kw) if finished else None)
    run = Run(rank, tmp_path, lr=1e-7)

    def scale(optimizer, *_):
        for parameter in run.ddp.parameters():
            parameter.grad *= 1 + run.rank

    run.optimizer.register_step_pre_hook(scale)
    for _ in range(8):
        run.train(1)
        rank.barrier()
    assert [code for code, _, _ in run.findings()] == ["DC201"]


def test_a_difference_of_rounding_is_silent(rank, tmp_path):
    run = Run(rank, tmp_path)
    for _ in range(4):
        run.train(1)
        with torch.no_grad():
            noise = 0.3 * (1 + run.rank) * torch.rand(8, 4)
            run.ddp.module[0].weight.add_(noise).sub_(noise)
    assert run.findings() == []


def test_a_difference_of_training_is_found_though_the_rate_is_tiny(rank, tmp_path):
    run = Run(rank, tmp_path, lr=1e-5)
    weight = run.ddp.module[0].weight

    def scale(*_):
        weight.grad.mul_(1 + 0.5 * run.rank)

    run.optimizer.register_step_pre_hook(scale)
    found = run.train(4).findings()
    assert [(code, names) for code, _, names in found] == [("DC201", ("0.weight",))]


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


@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_a_loss_scale_restored_on_some_ranks_is_found_on_its_line(rank, tmp_path, ranks):
    run = Run(rank, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    if run.rank in ranks:
        scaler.load_state_dict(scaler.state_dict() | {"scale": 32.0})  # here
    for _ in range(2):
        run.optimizer.zero_grad()
        scaler.scale(run.ddp(torch.randn(3, 4)).square().mean()).backward()
        scaler.step(run.optimizer)
        scaler.update()
    found = [(code, where) for code, where, _ in run.findings()]
    here = line(test_a_loss_scale_restored_on_some_ranks_is_found_on_its_line)
    assert found == ([("DC208", here)] if ranks == (1,) else [])


@pytest.mark.parametrize("mends", [True, False])
def test_a_step_that_one_rank_skips_is_told_at_the_end_unless_the_parameters_are_equal_then(rank, tmp_path, mends):
    run = Run(rank, tmp_path).train(20)
    run.optimizer.zero_grad()
    run.ddp(torch.randn(3, 4)).square().mean().backward()
    if run.rank == 0:
        run.optimizer.step()
    if mends:
        for parameter in run.ddp.parameters():
            dist.broadcast(parameter.detach(), 0)
    # Step 21 itself is not compared.
    assert [code for code, _, _ in run.findings()] == ([] if mends else ["DC502"])


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


@pytest.mark.parametrize("use", ["evaluated on rank 0", "state_dict alone", "a copy saved", "saved"])
def test_statistics_that_differ_are_a_note_where_they_are_saved_and_nothing_where_not(rank, tmp_path, use):
    run = Run(rank, tmp_path, batch_norm()).train(3)
    match use:
        case "evaluated on rank 0" if run.rank == 0:
            run.ddp.eval()
            with torch.no_grad():
                run.ddp.module(torch.ones(2, 4))
            run.ddp.train()
        case "state_dict alone":
            assert run.ddp.module.state_dict()
        case "a copy saved":
            torch.save(copy.deepcopy(run.ddp.module).state_dict(), io.BytesIO())
        case "saved":
            torch.save({"epoch": 1, "model": run.ddp.module.state_dict()}, io.BytesIO())  # here
    found = run.findings()
    where = line(test_statistics_that_differ_are_a_note_where_they_are_saved_and_nothing_where_not)
    names = ("1.running_mean", "1.running_var")
    assert found == ([("DC205", where, names)] if use == "saved" else [])
    assert {finding.severity for finding in run.session.all_findings()} <= {"note"}


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


def test_the_same_seed_has_a_line_where_the_wrapper_is_never_called(rank, tmp_path):
    run = Run(rank, tmp_path, nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    torch.manual_seed(0)
    for _ in range(4):
        run.ddp.module(torch.ones(3, 4) + run.rank).square().mean().backward()
        run.optimizer.step()  # here
    found = [where for code, where, _ in run.findings() if code == "DC207"]
    assert found == [line(test_the_same_seed_has_a_line_where_the_wrapper_is_never_called)]


def test_what_a_bypass_explains_is_not_said_twice(rank, tmp_path):
    run = Run(rank, tmp_path)
    for _ in range(3):
        run.ddp.module(torch.randn(3, 4)).square().mean().backward()
        run.optimizer.step()
    assert [code for code, _, _ in run.findings()] == ["DC101"]


def reduce_and_forget(parameters):
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)


def test_a_reduction_that_is_none_is_found_at_the_bypass(rank, tmp_path):
    run = Run(rank, tmp_path)
    for _ in range(3):
        outputs = run.ddp.module(torch.randn(3, 4))  # here
        run.optimizer.zero_grad()
        outputs.square().mean().backward()
        reduce_and_forget(list(run.ddp.parameters()))
        run.optimizer.step()
    found = run.findings()
    assert [code_and_line[:2] for code_and_line in found] == [
        ("DC101", line(test_a_reduction_that_is_none_is_found_at_the_bypass))
    ]


def test_gradients_written_by_hand_are_found_where_they_differ(rank, tmp_path):
    run = Run(rank, tmp_path)
    for _ in range(3):
        for parameter in run.ddp.parameters():
            parameter.grad = torch.randn_like(parameter)
        run.optimizer.step()  # here
    found = run.findings()
    assert [code_and_line[:2] for code_and_line in found] == [
        ("DC101", line(test_gradients_written_by_hand_are_found_where_they_differ))
    ]


def test_gradients_written_by_hand_the_same_everywhere_are_silent(rank, tmp_path):
    run = Run(rank, tmp_path)
    for step in range(3):
        for parameter in run.ddp.parameters():
            parameter.grad = torch.full_like(parameter, float(step))
        run.optimizer.step()
    assert run.findings() == []


def train_beside(run, stray, optimizer, reduce, steps=3):
    for _ in range(steps):
        outputs = run.ddp(torch.randn(3, 4))
        run.optimizer.zero_grad()
        optimizer.zero_grad()
        (outputs * stray).square().mean().backward()
        if reduce:
            dist.all_reduce(stray.grad)
        run.optimizer.step()
        optimizer.step()
    return run.findings()


def test_a_parameter_outside_that_starts_equal_and_drifts_is_found(rank, tmp_path):
    run = Run(rank, tmp_path)
    stray = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([stray], lr=0.1)  # here
    found = train_beside(run, stray, optimizer, reduce=False)
    expected = line(test_a_parameter_outside_that_starts_equal_and_drifts_is_found)
    assert [code_and_line[:2] for code_and_line in found] == [("DC102", expected)]


@pytest.mark.parametrize("reason", ["reduced", "its own from the start"])
def test_a_parameter_outside_is_silent_when(rank, tmp_path, reason):
    run = Run(rank, tmp_path)
    stray = nn.Parameter(torch.ones(2) if reason == "reduced" else torch.full((2,), 1.0 + run.rank))
    optimizer = torch.optim.SGD([stray], lr=0.1)
    assert train_beside(run, stray, optimizer, reduce=reason == "reduced") == []


def test_a_parameter_outside_that_drifts_once_a_warmup_has_begun_is_found(rank, tmp_path):
    run = Run(rank, tmp_path)
    stray = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([stray], lr=0.0)
    optimizer.register_step_post_hook(lambda *_: optimizer.param_groups[0].update(lr=1e-6))
    found = train_beside(run, stray, optimizer, reduce=False, steps=5)
    assert [code for code, _, _ in found] == ["DC102"]


@pytest.mark.parametrize("share", [1e-5, 0.1])
def test_a_parameter_outside_is_found_if_its_gradients_differ_by_more_than_rounding(rank, tmp_path, share):
    run = Run(rank, tmp_path)
    stray = nn.Parameter(torch.linspace(0.5, 1.5, 100))
    optimizer = torch.optim.SGD([stray], lr=0.1)
    for _ in range(3):
        run.ddp(torch.randn(3, 4)).square().mean().backward()
        run.optimizer.step()
        stray.grad = torch.linspace(-1, 1, 100) * (1 + share * run.rank)
        optimizer.step()
    assert [code for code, _, _ in run.findings()] == ([] if share == 1e-5 else ["DC102"])


def test_an_inner_loop_of_its_own_is_silent(rank, tmp_path):
    run = Run(rank, tmp_path)
    for _ in range(3):
        fast = copy.deepcopy(run.ddp.module)
        inner = torch.optim.SGD(fast.parameters(), lr=0.1)
        for _ in range(3):
            inner.zero_grad()
            fast(torch.randn(3, 4)).square().mean().backward()
            inner.step()
        run.train(1)
    assert run.findings() == []


def test_a_rank_keeps_its_own_passing_buffers(rank, tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    model.register_buffer("state", torch.zeros(2), persistent=False)
    run = Run(rank, tmp_path, model).train(2)
    run.ddp.module.state.fill_(run.rank)
    run.ddp.module.state_dict()
    assert run.train(1).findings() == []
