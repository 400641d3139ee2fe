"""The hearing: ranks are let in once, before any of them starts, and what they say is not believed to be whole."""

import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpcall.teach import testimony
from ddpcall.teach.testimony import GO, Hearing, unpack
from ddpcall.teach.witness import PROJECTIONS, Line, pack, project


@pytest.fixture
def path() -> Iterator[Path]:
    directory = tempfile.mkdtemp(dir="/tmp")  # a socket's path must be short
    yield Path(directory) / "line"
    shutil.rmtree(directory)


def connect(path: Path, hello: dict) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(30)
    try:
        line.connect(str(path))
        line.sendall(json.dumps(hello).encode() + b"\n")
    except OSError:
        line.close()
        raise
    return line


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_ranks_start_together_and_are_heard_to_the_end(path):
    hearing = Hearing(path, 2)
    lines = [connect(path, {"kind": "hello", "rank": rank}) for rank in (1, 0)]
    assert [line.recv(len(GO)) for line in lines] == [GO, GO]
    for line in lines:
        line.sendall(b'{"kind": "step", "parameters": []}\n{"kind": "forward"}\n{"kind": "end", "code": 0}')
        line.sendall(b"\n")
        line.close()
    told = hearing.close()
    assert [one.rank for one in told] == [0, 1]
    assert [(len(one.steps), one.forwards[0]["step"], one.end) for one in told] == [
        (1, 1, {"kind": "end", "code": 0})
    ] * 2


def test_nobody_speaks_for_a_rank_that_is_there(path):
    hearing = Hearing(path, 2)
    with connect(path, {"kind": "hello", "rank": 0}) as real:
        wait_for(lambda: 0 in hearing._heard)
        with connect(path, {"kind": "hello", "rank": 0}) as false, connect(path, {"rank": 7}) as stranger:
            assert (false.recv(1), stranger.recv(1)) == (b"", b"")  # cut
        with connect(path, {"kind": "hello", "rank": 1}) as other:
            assert (real.recv(len(GO)), other.recv(len(GO))) == (GO, GO)
            with pytest.raises(OSError, match=r"refused|No such file"):
                connect(path, {"kind": "hello", "rank": 1})  # the door is closed
    assert [one.rank for one in hearing.close()] == [0, 1]


@pytest.mark.parametrize("junk", [b"no JSON\n", b"[1]\n", b"[" * 100_000 + b"\n", b"\xff\n"])
def test_after_junk_a_rank_is_not_listened_to(junk, path):
    hearing = Hearing(path, 1)
    with connect(path, {"kind": "hello", "rank": 0}) as line:
        line.sendall(b'{"kind": "step"}\n' + junk)
        line.recv(len(GO))
        try:
            while line.send(b'{"kind": "step"}\n'):
                pass
        except OSError:
            pass
    assert len(hearing.close()[0].steps) == 1


def test_a_flood_is_cut_off(path, monkeypatch):
    monkeypatch.setattr(testimony, "MOST_BYTES", 3_000_000)
    hearing = Hearing(path, 1)
    with connect(path, {"kind": "hello", "rank": 0}) as line, pytest.raises(OSError, match=r"reset|pipe"):
        line.sendall(b'{"kind": "step"}\n' * 1_000_000)
    assert len(hearing.close()[0].steps) < 200_000


def test_a_rank_whose_grader_is_gone_goes_on(path):
    hearing = Hearing(path, 1)
    line = Line(str(path))
    line.say("hello", rank=0)
    line.wait_for_go()
    hearing._connections[0].shutdown(socket.SHUT_RDWR)
    for _ in range(10):
        line.say("step")
    line.close()
    assert hearing.close()[0].steps == []


def test_tensors_come_over_as_they_were():
    tensor = torch.randn(3, 5)
    assert np.array_equal(unpack(json.loads(json.dumps(pack(tensor)))), tensor.numpy())


def test_the_projection_of_a_mean_is_the_mean_of_projections():
    first, second = torch.randn(2, 7, 3, dtype=torch.float64)
    mean, one, other = (np.asarray(project(tensor) or ()) for tensor in ((first + second) / 2, first, second))
    assert mean.shape == (PROJECTIONS,)
    assert np.allclose(mean, (one + other) / 2)
    assert not np.allclose(one, other)
    assert project(None) is None
