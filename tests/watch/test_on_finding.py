"""`with ddpcall.watch(...)` in code: raised where the harm would be done, and undone whatever happens."""

import json
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import ddpcall
from ddpcall.watch.session import Session, WatchError
from tests.ranks.lab_process import clean_environment

WATCHED = (
    nn.Module,
    nn.Parameter,
    DistributedDataParallel,
    Optimizer,
    torch.autograd,
    torch.distributed.ProcessGroup,
)


def patched():
    """Return everything the watch could leave behind: patched attributes, and torch's global hooks."""
    names = [
        {name: id(value) for name, value in vars(owner).items() if name != "__slotnames__"} for owner in WATCHED
    ]
    steps: Any = sys.modules[Optimizer.__module__]
    hooks = [steps._global_optimizer_pre_hooks, steps._global_optimizer_post_hooks]
    registrations: Any = sys.modules[nn.Module.__module__]
    hooks += [
        registrations._global_module_registration_hooks,
        registrations._global_parameter_registration_hooks,
        registrations._global_forward_pre_hooks,
    ]
    return names, [len(each) for each in hooks], id(torch.compile), len(sys.meta_path)


@pytest.fixture(autouse=True)
def everything_undone():
    before = patched()
    yield
    assert patched() == before
    assert Session._running is None


class Training:
    def __init__(self, rank, steps=3):
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)
        self.ddp = DistributedDataParallel(self.net)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.1)
        torch.manual_seed(rank.rank)
        self.steps = steps
        self.done = 0

    def run(self, forward):
        for _ in range(self.steps):
            self.optimizer.zero_grad()
            forward(torch.randn(3, 4)).square().mean().backward()
            self.optimizer.step()
            self.done += 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("on_finding", ["warn", "raise", "record"])
def test_a_bypass_is_said_raised_or_kept(rank, capsys, on_finding):
    kept = []
    with_error = pytest.raises(WatchError, match="DC101") if on_finding == "raise" else nullcontext()
    with with_error as caught, ddpcall.watch(on_finding=on_finding, every=0) as session:
        kept.append(session)
        training = Training(rank)
        before = training.net.weight.detach().clone()
        training.run(training.ddp.module)
    (finding,) = kept[0].findings
    assert (finding.code, finding.step) == ("DC101", 1)
    said = capsys.readouterr().err.count("ddpcall: DC101")
    if on_finding == "raise":
        assert caught is not None
        assert (training.done, said) == (0, 0)
        assert torch.equal(before, training.net.weight), "raised before the step that would do the harm"
        assert caught is not None
        assert caught.value.finding == finding
        assert [entry.name for entry in caught.traceback if entry.path == Path(__file__)][-1] == "run"
    else:
        assert (training.done, finding.count) == (3, 3)
        assert said <= (on_finding == "warn"), "once, by whichever rank was first"
    assert "forward" not in vars(training.net)


@pytest.mark.ranks(2)
def test_nothing_is_raised_where_nothing_is_wrong(rank):
    with ddpcall.watch(on_finding="raise"):
        training = Training(rank)
        training.run(training.ddp)
    assert training.done == 3


def backward(outputs):
    outputs.square().mean().backward()


def use_weights(training, x):
    return nn.functional.linear(x, training.net.weight, training.net.bias)


def backward_without_sync(training, x):
    with training.ddp.no_sync():
        backward(training.ddp(x))


def backward_twice(training, x):
    loss = training.ddp(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def reduce_gradients(training):
    for parameter in training.net.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= 2


def restore(training, x):
    kept = [parameter.grad.clone() for parameter in training.net.parameters()]
    backward(training.net(x))
    for parameter, gradient in zip(training.net.parameters(), kept, strict=True):
        parameter.grad.copy_(gradient)


def reduce_what_was_added(training, x):
    backward(training.net(x))
    reduce_gradients(training)


def clear_what_was_added(training, x):
    training.optimizer.zero_grad()
    backward(training.net(x))
    training.optimizer.zero_grad(set_to_none=False)


def use_frozen(training, x):
    for parameter in training.net.parameters():
        parameter.requires_grad_(False)
    backward(training.net(x.requires_grad_()))


def clip(training, x):
    nn.utils.clip_grad_norm_(training.net.parameters(), 0.01)


MICRO_BATCHES = {
    "wrapped": lambda training, x: backward(training.ddp(x)),
    "inner": lambda training, x: backward(training.net(x)),
    "weights": lambda training, x: backward(use_weights(training, x)),
    "no_sync": backward_without_sync,
    "twice": backward_twice,
    "restored": restore,
    "reduced": reduce_what_was_added,
    "cleared": clear_what_was_added,
    "frozen": use_frozen,
    "clipped": clip,
}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("first_steps", [0, 20], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("micro_batches", "code"),
    [
        ("inner", "DC101"),
        ("weights", "DC101"),
        ("wrapped inner", "DC101"),
        ("inner wrapped inner", "DC101"),
        ("wrapped no_sync inner clipped", "DC101"),
        ("wrapped weights weights", "DC101"),
        ("wrapped no_sync", "DC104"),
        ("twice", "DC101"),
    ],
)
def test_a_step_that_uses_a_part_as_one_rank_computed_it_is_stopped_before(rank, micro_batches, code, first_steps):
    """Weights are as they were on each rank: what is seen there is enough, nobody waits for another's."""
    trainings = []

    def train():
        with ddpcall.watch(on_finding="raise"):
            training = Training(rank, steps=first_steps)
            training.run(training.ddp)
            trainings.append((training, training.net.weight.detach().clone()))
            for _ in range(2 if first_steps and micro_batches == "wrapped no_sync" else 1):
                trainings[0] = training, training.net.weight.detach().clone()
                training.optimizer.zero_grad()
                for kind in micro_batches.split():
                    MICRO_BATCHES[kind](training, torch.randn(3, 4))
                training.optimizer.step()

    with pytest.raises(WatchError, match=code) as caught:
        train()
    training, before = trainings[0]
    assert torch.equal(training.net.weight, before)
    assert caught.traceback[1].name == "train"
    assert [entry.name for entry in caught.traceback if entry.path == Path(__file__)][-1] == "train"


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "micro_batches",
    [
        "wrapped wrapped",
        "inner wrapped",
        "no_sync no_sync wrapped clipped",
        "wrapped restored",
        "wrapped reduced",
        "no_sync reduced clipped",
        "cleared wrapped",
        "wrapped frozen",
    ],
)
def test_what_is_reduced_dropped_or_never_used_is_not_raised(rank, micro_batches):
    with ddpcall.watch(on_finding="raise"):
        training = Training(rank)
        for _ in range(3):
            training.optimizer.zero_grad()
            for kind in micro_batches.split():
                MICRO_BATCHES[kind](training, torch.randn(3, 4))
            training.optimizer.step()
            for parameter in training.net.parameters():
                parameter.requires_grad_()


@pytest.mark.ranks(2)
def test_the_scripts_own_exception_comes_out_and_what_was_pending_is_kept(rank):
    """A window without synchronization, of a step that is not measured, waits for one that is."""
    sessions = []

    def fail():
        with ddpcall.watch(on_finding="raise", every=0) as session:
            sessions.append(session)
            train_unsynchronized_last(rank)
            assert session.findings == []
            raise KeyError("own")

    with pytest.raises(KeyError, match="own") as caught:
        fail()
    assert caught.value.__context__ is None
    assert [finding.code for finding in sessions[0].findings] == ["DC104"]


def train_unsynchronized_last(rank):
    training = Training(rank, steps=20)
    training.run(training.ddp)
    backward_without_sync(training, torch.randn(3, 4))
    training.optimizer.step()


@pytest.mark.ranks(2)
def test_what_the_end_of_the_block_shows_is_raised_there(rank):
    def train():
        with ddpcall.watch(on_finding="raise", every=0):
            train_unsynchronized_last(rank)

    with pytest.raises(WatchError, match="DC104"):
        train()


@pytest.mark.ranks(2)
def test_one_model_is_watched_from_now_on(rank):
    training = Training(rank, steps=1)
    training.run(training.ddp.module)
    with ddpcall.watch(training.ddp, on_finding="record", every=0) as session:
        training.run(training.ddp)
        assert session.findings == []
        training.run(training.ddp.module)
    assert [(finding.code, finding.step) for finding in session.findings] == [("DC101", 2)]
    training.run(training.ddp.module)
    assert session.findings[0].count == 1, "nothing is seen after the end"


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("apply", "code"), [(fully_shard, "DC306"), (replicate, "DC101")])
@pytest.mark.parametrize("called_before", [True, False])
def test_a_model_that_was_wrapped_before_is_watched_however_it_was(rank, apply, code, called_before):
    training = Training(rank, steps=1)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    apply(net)
    training.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if called_before:
        training.run(net)
    with ddpcall.watch(net, on_finding="record", every=0) as session:
        training.run(net)
        assert session.findings == []
        with torch.no_grad():
            net(torch.ones(1, 4))  # gathers a sharded model's parameters
        training.run(net.forward)
    assert [finding.code for finding in session.findings] == [code]


@pytest.mark.ranks(2)
def test_one_watch_after_the_other_starts_anew_on_the_same_model(rank):
    training = Training(rank, steps=1)
    for _ in range(2):
        with ddpcall.watch(training.ddp, on_finding="record", every=0) as session:
            training.run(training.ddp.module)
            with pytest.raises(RuntimeError, match="Another ddpcall watch is running"):
                ddpcall.watch()
            training.run(training.ddp.module)
        assert [(finding.code, finding.count) for finding in session.findings] == [("DC101", 2)]
    rank.barrier()
    file = session.launch.file
    # A watch that was refused counts as none: the files of the others are cleared up.
    assert list(file.parent.glob(f"*{file.name}*")) == []


@pytest.mark.ranks(2)
@pytest.mark.parametrize("calls_wrapper", [True, False])
def test_the_next_watch_on_the_same_file_may_begin_before_another_rank_has_left_the_last(
    rank, tmp_path, calls_wrapper, monkeypatch
):
    shared = [str(tmp_path)]
    torch.distributed.broadcast_object_list(shared, 0)
    file = Path(shared[0]) / "findings.json"
    for name, value in (("RANK", rank.rank), ("WORLD_SIZE", 2)):  # as a launcher says
        monkeypatch.setenv(name, str(value))
        monkeypatch.setenv(f"LOCAL_{name}", str(value))
    monkeypatch.setenv("DDPCALL_LAUNCH", file.parent.name)
    monkeypatch.setattr("ddpcall.watch.compare.exchange.WAIT_S", 1.5)  # for a rank that is in its next watch
    training = Training(rank)
    first = ddpcall.watch(training.ddp, on_finding="record", json=file)
    training.run(training.ddp.module)
    if rank.rank == 1:
        rank.barrier()  # rank 0 is in its next watch
    first.close()
    second = ddpcall.watch(training.ddp, on_finding="record", json=file)
    if rank.rank == 0:
        rank.barrier()
    for parameter in training.net.parameters():
        torch.distributed.broadcast(parameter.data, 0)
    training.run(training.ddp if calls_wrapper else training.net)
    second.close()
    rank.barrier()
    codes, content = ([] if calls_wrapper else ["DC101"]), json.loads(file.read_text())
    assert [finding.code for finding in first.findings] == ["DC101"]
    assert [finding.code for finding in second.findings] == codes
    assert [(each["code"], each["ranks"]) for each in content["findings"]] == [(code, [0, 1]) for code in codes]
    assert content["watched"]["ranks"] == [0, 1]
    assert content["watched"]["mixing"]["shapes"] == {"averaged" if calls_wrapper else "local": 3}
    assert second.answer().is_evidence
    if rank.rank == 1:  # the last to leave the first
        assert [(finding.code, finding.ranks) for finding in first.all_findings()] == [("DC101", (0, 1))]
    rank.barrier()
    assert [path.name for path in file.parent.glob("*findings.json*")] == ["findings.json"]


HOOKED = """
layer = torch.nn.Linear(2, 2)
layer.register_forward_hook(lambda *_: None)
layer.forward(torch.ones(1, 2))
"""


def test_cells_that_are_executed_have_lines_too():
    """A notebook compiles its cells under made-up file names."""
    with ddpcall.watch(on_finding="record") as session:
        for number, cell in enumerate(["import torch", HOOKED]):
            exec(compile(cell, f"<ipython-input-{number}>", "exec"), namespace := globals().copy())
        assert "layer" in namespace
    (finding,) = session.findings
    assert (finding.code, finding.file, finding.line, finding.function) == (
        "DC301",
        "<ipython-input-1>",
        4,
        "<module>",
    )


def test_raising_passes_through_a_test_of_pytest(tmp_path):
    (tmp_path / "test_users.py").write_text(
        textwrap.dedent("""
        import ddpcall, pytest, torch

        @pytest.fixture(autouse=True)
        def watched():
            with ddpcall.watch(on_finding="raise"):
                yield

        @pytest.mark.parametrize("call", ["__call__", "forward"])
        def test_layer(call):
            layer = torch.nn.Linear(2, 2)
            layer.register_forward_hook(lambda *_: None)
            getattr(layer, call)(torch.ones(1, 2))
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_users.py"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "WatchError: ddpcall: DC301 hooks-skipped (warning) at test_users.py:13 in test_layer" in done.stdout
