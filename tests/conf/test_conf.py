"""Every option of every group, a file or a name in a list of the code's, composes into the typed schema."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from ddpcall.compare import CAUSES
from ddpcall.lab.comparisons import check_comparisons
from ddpcall.lab.data import DATA
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.grid import check_expectations, expand_grid, expected_verdicts
from ddpcall.lab.loggers import LOGGERS
from ddpcall.lab.one_process_cases import CASES
from ddpcall.lab.schema import TrainConfig, register_schema
from ddpcall.paths import CallPath
from ddpcall.wrappers import WRAPPERS

CONF = Path(__file__).parents[2] / "conf"
FILES = [(path.parent.name, path.stem) for path in sorted(CONF.glob("*/*.yaml")) if path.parent.name != "hydra"]
LISTS = {"wrapper": list(WRAPPERS), "path": list(CallPath), "data": list(DATA), "logger": list(LOGGERS)}
NAMES = [(group, str(name)) for group, names in LISTS.items() for name in names if name != "custom"]
OPTIONS = [*FILES, *NAMES]
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]


def compose_typed(*overrides: str) -> TrainConfig:
    register_schema()
    with initialize_config_module("ddpcall.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("train", list(overrides)))
    assert isinstance(config, TrainConfig)
    return config


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes_and_makes_a_grid(group, option):
    config = compose_typed(f"{group}={option}")
    if group in LISTS:
        assert getattr(config, group).name == option
    if group == "path" or group == "wrapper":
        return  # some pairs with the default of the other group are refused, which test_grid shows
    assert expand_grid(config).cells


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_states_an_expectation_for_each_of_its_cells(name):
    config = compose_typed(f"experiment={name}")
    assert config.name == name
    if config.one_process:
        check_comparisons(config)  # each of them names what it expects
        return
    check_expectations(config)
    for cell in expand_grid(config).cells:
        assert {"gradients", "mixing"} <= set(expected_verdicts(cell, config.expect)), cell.label()


def test_each_comparison_with_one_process_stands_beside_one_that_is_the_same():
    expected: dict[str, set[str]] = {}
    for entry in compose_typed("experiment=same_as_one_process").one_process:
        expected.setdefault(entry.case, set()).add(entry.expect)
    assert set(expected) == set(CASES)
    assert {cause for causes in expected.values() for cause in causes} == set(CAUSES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("one_process=[{case: sun, expect: same}]", "case 'sun' is unknown; write one of: mean, sum, "),
        ("one_process=[{case: sum, expect: doubled}]", "sum: expect: 'doubled' is unknown; write one of: same"),
        ("one_process=[{case: sum, wrapper: dpp, expect: same}]", "wrapper 'dpp' is unknown; write one of: none"),
        (
            "one_process=[{case: norm_in_plan, wrapper: ddp, expect: same}]",
            "wraps its model itself: leave wrapper",
        ),
        ("ranks=1", "one rank is one process; write ranks=2"),
        ("device=cuda", "run on the CPU; write device=cpu"),
        ("grid.path=[call]", "take grid and expect out"),
        ("checkpoint.every=5", "neither saved nor resumed: leave checkpoint out"),
    ],
)
def test_comparisons_that_cannot_work_are_refused_with_what_to_write(override, message):
    config = compose_typed("experiment=same_as_one_process", override)
    with pytest.raises(WrongUse, match=re.escape(message)):
        check_comparisons(config)


def test_no_file_says_no_more_than_a_name():
    for group, option in FILES:
        lines = (CONF / group / f"{option}.yaml").read_text().splitlines()
        assert lines != [f"name: {option}"], f"register {group}={option} in `register_schema`"


@pytest.mark.parametrize("group", LISTS)
def test_an_unknown_option_is_refused_with_the_options_there_are(group):
    with pytest.raises(MissingConfigException) as raised:
        compose_typed(f"{group}=nonsense")
    assert set(raised.value.options or ()) == {name for of, name in NAMES if of == group}


def test_the_experiments_the_readme_speaks_of_are_there():
    assert {"forward_bypass", "arming", "replicate_bypass", "compile_bypass", "hooks_bypass"} <= set(EXPERIMENTS)


def test_experiments_and_overrides_win_over_the_main_file():
    config = compose_typed("experiment=compile_bypass", "steps=3", "model=convnet", "optimizer=adamw")
    assert (config.steps, config.optimizer.lr) == (3, 0.002)
    assert config.model == {"_target_": "ddpcall.lab.models.ConvNet"}
    assert compose_typed("experiment=compile_bypass").steps == 6


def test_a_typo_inside_an_experiment_is_an_error(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nstepz: 3\n")
    with pytest.raises(Exception, match="stepz"):
        compose_typed("experiment=mine", f"hydra.searchpath=[file://{tmp_path}]")
