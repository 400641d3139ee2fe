"""What is damaged is refused by the name of its file, the one before it is taken, and no code runs."""

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpcall.lab import checkpoint as module
from ddpcall.lab.checkpoint import Checkpoints

REST = {"numbers": [1, 2.5, None, True], "pair": (1, "two"), "words": {"a", "b"}, "tensor": torch.arange(3)}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "parameters/w": torch.full((3, 5), value),
        "buffers/none": torch.empty(0),
        "buffers/n": torch.tensor(7),
    }


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Two checkpoints: of steps 10 and 20."""
    checkpoints = Checkpoints(tmp_path / "trial0", keep=2)
    assert checkpoints.save(10, tensors(1.0), REST, None) == ""
    assert checkpoints.save(20, tensors(2.0), REST, None) == ""
    return checkpoints


def renew_manifest(path: Path) -> None:
    """Make the checksums right again, as somebody would who means harm."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: module._describe(path / name) for name in manifest["files"]}
    del manifest["digest"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "digest": module._digest_of(manifest)}))


def test_what_was_saved_comes_back(saved):
    found, refused = saved.load_newest(None)
    assert refused == []
    assert found is not None
    assert found.step == 20
    assert {name: tensor.tolist() for name, tensor in found.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors(2.0).items()
    }
    assert {**found.rest, "tensor": found.rest["tensor"].tolist()} == {**REST, "tensor": [0, 1, 2]}


def test_only_the_newest_are_kept_and_nothing_half_written_stays(saved):
    assert saved.save(30, tensors(), REST, None) == ""
    assert sorted(os.listdir(saved.path)) == ["latest", "step20", "step30"]
    assert (saved.path / "latest").read_text() == "step30\n"


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path: Path) -> None:
    shutil.copy(path, path.parent.parent / "elsewhere")
    path.unlink()
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (flip_bit, "changed|damaged"),
        (lambda path: os.truncate(path, path.stat().st_size // 2), "torn|damaged"),
        (lambda path: os.truncate(path, 0), "torn|damaged"),
        (Path.unlink, "missing"),
        (replace_by_fifo, "no regular file"),
        (replace_by_link, "no regular file"),
    ],
    ids=["flipped", "torn", "empty", "missing", "fifo", "link"],
)
def test_damage_is_refused_by_name_and_the_checkpoint_before_is_taken(saved, name, damage, word):
    damage(saved.path / "step20" / name)
    found, (message,) = saved.load_newest(None)
    assert found.step == 10
    assert str(saved.path / "step20" / name) in message
    assert any(each in message for each in word.split("|")), message


def test_every_flipped_bit_of_a_manifest_is_noticed(saved):
    path = saved.path / "step20" / "manifest.json"
    whole = path.read_bytes()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 4]) + whole[index + 1 :])
        with pytest.raises(module.CheckpointRefused, match=r"manifest\.json|is torn|missing|was changed"):
            module.verify(saved.path / "step20", 1)


@pytest.mark.parametrize("latest", ["step99\n", "", "\xff", "../../etc\n"])
def test_a_pointer_that_points_nowhere_does_not_hide_what_is_there(saved, latest):
    (saved.path / "latest").write_bytes(latest.encode("latin1"))
    assert saved.load_newest(None)[0].step == 20


def test_another_number_of_ranks_is_told_what_that_means(saved):
    with pytest.raises(module.CheckpointRefused, match="saved by 1 ranks, and 3 run now: every step would see"):
        module.verify(saved.path / "step20", 3)


def test_a_full_disk_is_told_and_the_checkpoint_before_stands(saved):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, before[1]))
    try:
        failure = saved.save(30, {"parameters/w": torch.zeros(2**20)}, REST, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failure.startswith("rank 0: ")
    assert saved.load_newest(None)[0].step == 20
    assert saved.save(30, tensors(), REST, None) == ""
    assert saved.load_newest(None)[0].step == 30


def test_what_a_killed_process_left_is_neither_loaded_nor_in_the_way(saved):
    shutil.copytree(saved.path / "step20", saved.path / ".step30.part")
    assert saved.load_newest(None)[0].step == 20
    assert saved.save(30, tensors(3.0), REST, None) == ""
    assert saved.load_newest(None)[0].tensors["parameters/w"].max() == 3


class Harm:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_the_metadata_does_not_run(saved, tmp_path):
    path = saved.path / "step20"
    (path / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    renew_manifest(path)
    found, (message,) = saved.load_newest(None)
    assert "mkdir, which is not read: it could run code" in message
    assert found.step == 10
    assert not (tmp_path / "harm").exists()


def test_a_pickle_among_the_rest_does_not_run(saved, tmp_path):
    assert saved.save(30, tensors(), {"harm": Harm(tmp_path / "harm")}, None) == ""
    found, (message,) = saved.load_newest(None)
    assert "step30 cannot be read" in message
    assert found.step == 20
    assert not (tmp_path / "harm").exists()


def change_metadata(path: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    renew_manifest(path)


def test_metadata_that_names_another_file_or_more_than_there_is_are_refused(saved):
    def leave(metadata: Any) -> None:
        for stored in metadata.storage_data.values():
            stored.relative_path = "../step10/__0_0.distcp"

    def grow(metadata: Any) -> None:
        metadata.state_dict_metadata["rank0/parameters/w"].size = torch.Size([2**40])

    change_metadata(saved.path / "step20", leave)
    change_metadata(saved.path / "step10", grow)
    found, messages = saved.load_newest(None)
    assert found is None
    assert "names a file outside of its directory" in messages[0]
    assert "speaks of more than the files hold" in messages[1]
