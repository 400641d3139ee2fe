"""What ranks tell: in files that must be new, each of one rank, and not believed to be whole."""

import json
from pathlib import Path

import pytest
import torch

from ddpcall.teach.grade import observations
from ddpcall.teach.grade.observations import FactFile, read_observations
from ddpcall.teach.grade.observe import digest_rows


def tell(directory: Path, rank: int, *kinds: str) -> None:
    facts = FactFile(directory, rank)
    for kind in kinds:
        facts.tell(kind, code=0)
    facts.close()


def test_ranks_are_read_in_order_and_to_the_end(tmp_path):
    for rank in (1, 0):
        tell(tmp_path, rank, "step", "forward", "end")
    told = read_observations(tmp_path, 2)
    assert [one.rank for one in told] == [0, 1]
    assert [(len(one.steps), one.forwards[0]["step"], one.end) for one in told] == [
        (1, 1, {"kind": "end", "code": 0})
    ] * 2


def test_a_rank_that_has_told_nothing_is_missing(tmp_path):
    tell(tmp_path, 1)
    assert [one.rank for one in read_observations(tmp_path, 2)] == [1]


def test_nobody_speaks_for_a_rank_that_is_there_and_no_rank_starts_where_somebody_has(tmp_path):
    tell(tmp_path, 0, "step")
    with pytest.raises(FileExistsError):
        tell(tmp_path, 0, "step", "step")
    tell(tmp_path, 7, "step")
    assert [(one.rank, len(one.steps)) for one in read_observations(tmp_path, 2)] == [(0, 1)]


@pytest.mark.parametrize("junk", [b"no JSON\n", b"[1]\n", b"[" * 100_000 + b"\n", b"\xff\n", b"{}\n"])
def test_after_junk_nothing_is_read(junk, tmp_path):
    step = b'{"kind": "step"}\n'
    (tmp_path / "rank0.jsonl").write_bytes(step + junk + step)
    assert len(read_observations(tmp_path, 1)[0].steps) == 1


def test_a_flood_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(observations, "MOST_BYTES", 30_000)
    (tmp_path / "rank0.jsonl").write_bytes(b'{"kind": "step"}\n' * 100_000)
    assert 0 < len(read_observations(tmp_path, 1)[0].steps) < 2_000


@pytest.mark.parametrize("target", ["/dev/zero", "rank1.jsonl"])
def test_a_link_is_not_followed(target, tmp_path):
    tell(tmp_path, 1, "step")
    (tmp_path / "rank0.jsonl").symlink_to(target)
    assert [one.rank for one in read_observations(tmp_path, 2)] == [1]


def test_a_rank_whose_file_is_gone_goes_on(tmp_path):
    facts = FactFile(tmp_path, 0)
    facts.close()
    facts.tell("step")
    assert read_observations(tmp_path, 1)[0].steps == []


def test_samples_are_told_apart_by_their_values():
    batch = torch.randn(3, 5)
    first, second, third = digest_rows(batch)
    assert digest_rows(torch.stack([batch[2], batch[0]])) == [third, first]
    assert len({first, second, third}) == 3
    assert json.loads(json.dumps(first)) == first
