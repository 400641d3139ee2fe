import socket

import pytest
import torch

from ddpcall.lab.errors import WrongUse
from ddpcall.lab.guard import dump_stacks
from ddpcall.lab.world import RankLost, World, choose_accelerator, open_world


@pytest.fixture
def gpus(monkeypatch):
    def pretend(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return pretend


@pytest.mark.parametrize(
    ("number", "wanted", "chosen"),
    [
        (0, ("auto", "auto"), ("cpu", "gloo")),
        (2, ("auto", "auto"), ("cuda:1", "nccl")),
        (1, ("auto", "auto"), ("cuda:0", "gloo")),
        (1, ("cpu", "auto"), ("cpu", "gloo")),
        (2, ("cuda", "gloo"), ("cuda:1", "gloo")),
    ],
)
def test_device_and_backend_follow_the_gpus(gpus, number, wanted, chosen):
    gpus(number)
    accelerator = choose_accelerator(*wanted, local_rank=1, local_world_size=2)
    assert (str(accelerator.device), accelerator.backend) == chosen


@pytest.mark.parametrize(
    ("number", "wanted", "message"),
    [
        (0, ("cuda", "auto"), "torch sees no GPU here. Write device=cpu"),
        (0, ("auto", "nccl"), "backend=nccl needs CUDA tensors.*Write backend=gloo"),
        (2, ("cpu", "nccl"), "backend=nccl needs CUDA tensors"),
        (1, ("cuda", "nccl"), "needs a GPU for each of the 2 local ranks, and there are 1"),
        (0, ("tpu", "auto"), "write device=auto|cpu|cuda"),
    ],
)
def test_what_is_not_there_is_refused_with_what_to_write(gpus, number, wanted, message):
    gpus(number)
    with pytest.raises(WrongUse, match=message):
        choose_accelerator(*wanted, local_rank=0, local_world_size=2)


def test_a_world_of_one_needs_no_store():
    world = World()
    assert world.collect("key", "mine", 1.0) == ["mine"]
    assert world.claim("anything")
    assert not world.is_over()


def test_a_rank_that_says_nothing_is_named():
    store = torch.distributed.HashStore()
    here, there = World(rank=0, world_size=3, store=store), World(rank=2, world_size=3, store=store)
    there.publish("report", "late")
    with pytest.raises(RankLost, match="rank 1 disappeared") as lost:
        here.collect("report", "mine", 0.05)
    assert lost.value.ranks == [1]


def test_only_one_rank_may_claim():
    store = torch.distributed.HashStore()
    worlds = [World(rank=rank, world_size=3, store=store) for rank in range(3)]
    assert [world.claim("summary") for world in worlds] == [True, False, False]
    assert [world.claim("summary") for world in worlds] == [True, False, False]


def test_a_port_in_use_is_said_in_one_message(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(
            WrongUse, match=rf"cannot open the store at 127.0.0.1:{port}.*\n.*torchrun --standalone"
        ):
            open_world()


def test_a_lone_rank_variable_is_wrong_use(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(WrongUse, match="WORLD_SIZE"):
        open_world()


def test_stacks_name_the_function_that_runs():
    assert "test_stacks_name_the_function_that_runs" in dump_stacks()
