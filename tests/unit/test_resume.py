"""What stands of an earlier attempt, and what is refused."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from ddpcall.evidence import Environment
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.resume import find_earlier
from ddpcall.lab.run_directory import RECORDS, RunDirectory
from ddpcall.lab.schema import TrainConfig

HERE = Environment(torch="2.13", python="3.11", backend="gloo", device="cpu", device_name="x86", world_size=2)
CONFIG = dataclasses.asdict(TrainConfig(optimizer={"name": "adamw", "lr": 1e-05}))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    """A run of which two trials are finished and a third was cut while it was written down."""
    made = RunDirectory(tmp_path / "run")
    environment = dataclasses.asdict(HERE)
    made.create(OmegaConf.to_yaml(OmegaConf.create(CONFIG)), environment, {"outcome": "running"})
    lengths = []
    for number in range(3):
        for name in RECORDS:
            made.append(name, [{"number": number, "of": name}])
        lengths.append(made.sizes())
    made.write_summary({"outcome": "running", "environment": environment, "lengths": lengths[:2]})
    return made


def test_finished_trials_stand_and_what_was_cut_is_cut_off(directory):
    earlier = find_earlier(directory, CONFIG, HERE)
    assert [record["number"] for record in earlier.records] == [0, 1]
    assert earlier.is_there
    assert earlier.notes == ()
    assert directory.sizes() == earlier.lengths[-1]


@pytest.mark.parametrize("name", RECORDS)
def test_a_torn_file_is_named_and_its_trials_run_again(directory, name):
    with (directory.path / name).open("r+") as file:
        file.truncate(60)
    earlier = find_earlier(directory, CONFIG, HERE)
    assert [record["number"] for record in earlier.records] == [0]
    assert f"{name} is torn or changed: trials from number 1 on run again" in earlier.notes[0]
    assert directory.sizes() == earlier.lengths[0]


def test_a_changed_line_is_no_evidence(directory):
    path = directory.path / "evidence.jsonl"
    path.write_text("x" + path.read_text()[1:])
    assert find_earlier(directory, CONFIG, HERE).records == ()


def test_another_configuration_is_refused_key_by_key(directory):
    with pytest.raises(WrongUse, match=r"(?s)another configuration:.*steps: 60 there, 61 here.*resume=never"):
        find_earlier(directory, {**CONFIG, "steps": 61}, HERE)


def test_how_a_run_is_kept_may_differ(directory):
    assert find_earlier(directory, {**CONFIG, "report": False, "ranks": 3}, HERE).records


def test_another_number_of_ranks_goes_on_and_is_told(directory):
    earlier = find_earlier(directory, CONFIG, dataclasses.replace(HERE, world_size=3))
    assert len(earlier.records) == 2
    assert "finished trials were measured on 2 ranks and stand; 3 ranks run now" in earlier.notes[0]


def test_another_torch_is_told(directory):
    earlier = find_earlier(directory, CONFIG, dataclasses.replace(HERE, torch="2.14"))
    assert earlier.notes == ("torch was 2.13 and is 2.14: what is resumed may not be equal to the bit",)


def test_nothing_there_is_no_attempt(tmp_path):
    assert not find_earlier(RunDirectory(tmp_path / "none"), CONFIG, HERE).is_there


@pytest.mark.parametrize("lengths", [None, 3, [3], [{}], [{"evidence.jsonl": "x"}]])
def test_a_summary_of_another_program_is_refused(directory, lengths):
    directory.write_summary({"outcome": "running", "lengths": lengths})
    with pytest.raises(WrongUse, match="does not say which trials are finished"):
        find_earlier(directory, CONFIG, HERE)
