import pytest
import torch

from ddpcall.evidence import Cell
from ddpcall.lab.errors import WrongUse
from ddpcall.lab.grid import check_expectations, expand_grid, expected_verdicts
from ddpcall.lab.records import TrialRecord
from ddpcall.lab.schema import CellConfig, ExpectationConfig, GridConfig, PathConfig, TrainConfig, WrapperConfig
from ddpcall.paths import Batch, SyncWindow, split_batch


def make_config(**grid: list) -> TrainConfig:
    return TrainConfig(wrapper=WrapperConfig(name="ddp"), path=PathConfig(name="call"), grid=GridConfig(**grid))


def unmet(gradients: str, expected: dict[str, str]) -> dict[str, dict[str, str]]:
    verdicts = {"gradients": gradients, "hooks_inner": "fired"}
    return TrialRecord(cell=Cell(wrapper="ddp", path="call"), verdicts=verdicts, expected=expected).unmet


def test_an_empty_grid_is_the_one_chosen_cell():
    grid = expand_grid(make_config())
    assert [cell.label() for cell in grid.cells] == ["ddp × call"]
    assert grid.left_out == ()


def test_the_axes_are_crossed_in_order_and_meaningless_pairs_left_out_with_their_reason():
    grid = expand_grid(make_config(wrapper=["none", "ddp"], path=["call", "inner_call"]))
    assert [cell.label() for cell in grid.cells] == ["none × call", "ddp × call", "ddp × inner_call"]
    assert grid.left_out == (
        "none × inner_call makes no sense: none works in place, the wrapped object is the inner module",
    )


def test_no_sync_makes_no_sense_without_ddp():
    grid = expand_grid(make_config(wrapper=["replicate"], window=["plain", "no_sync_forward"]))
    assert [cell.label() for cell in grid.cells] == ["replicate × call"]


def test_cells_named_one_by_one_are_crossed_only_with_the_axes_they_do_not_name():
    cells = [CellConfig(wrapper="ddp", window="no_sync_both"), CellConfig(wrapper="ddp_ring", path="call")]
    grid = expand_grid(make_config(path=["call", "forward"], wrapper=["none"], cells=cells))
    assert [cell.label() for cell in grid.cells] == [
        "ddp × call × no_sync_both",
        "ddp × forward × no_sync_both",
        "ddp_ring × call",
    ]


def test_an_unknown_name_in_a_cell_is_refused_with_the_known_ones():
    with pytest.raises(WrongUse, match=r"wrapper: 'nonsense' is unknown; write one of: \w+"):
        expand_grid(make_config(cells=[CellConfig(wrapper="nonsense")]))


def test_the_last_micro_batch_alone_stands_outside_the_synchronization():
    batch = Batch(torch.arange(5.0)[:, None], torch.arange(5))
    (first, head), (last, tail) = split_batch(SyncWindow.NO_SYNC_LAST_MICRO_BATCH, batch)
    assert (first, last) == (SyncWindow.PLAIN, SyncWindow.NO_SYNC_BOTH)
    assert torch.equal(torch.cat([head.inputs, tail.inputs]), batch.inputs)
    assert torch.equal(torch.cat([head.targets, tail.targets]), batch.targets)
    assert split_batch(SyncWindow.NO_SYNC_BOTH, batch) == [(SyncWindow.NO_SYNC_BOTH, batch)]


def test_a_meaningless_pair_alone_is_refused_with_those_that_make_sense():
    with pytest.raises(WrongUse, match=r"none × inner_call makes no sense(.|\n)*ddp × call, forward, inner_call"):
        expand_grid(make_config(wrapper=["none"], path=["inner_call"]))


@pytest.mark.parametrize("axis", ["wrapper", "path", "window", "hooks"])
def test_unknown_names_are_refused_with_the_known_ones(axis):
    with pytest.raises(WrongUse, match=r"'nonsense' is unknown; write one of: \w+"):
        expand_grid(make_config(**{axis: ["nonsense"]}))


def test_later_expectations_win_and_models_match_by_their_short_name():
    expectations = [
        ExpectationConfig(gradients="synced", hooks_inner="fired"),
        ExpectationConfig(path="forward", gradients="local"),
        ExpectationConfig(model="Mlp", compiled="none"),
        ExpectationConfig(model="lp", compiled="eager"),
    ]
    cell = Cell(wrapper="replicate", path="forward", model="ddpcall.lab.models.Mlp")
    expected = expected_verdicts(cell, expectations)
    assert expected == {"gradients": "local", "hooks_inner": "fired", "compiled": "none"}


def test_an_expectation_can_fail_and_says_how():
    assert unmet("local", {"gradients": "synced", "hooks_inner": "fired"}) == {
        "gradients": {"expected": "synced", "measured": "local"}
    }
    assert unmet("synced", {"gradients": "synced"}) == {}


def test_a_crash_must_have_been_expected():
    assert unmet("crashed", {}) == {"gradients": {"expected": "no crash", "measured": "crashed"}}
    assert unmet("crashed", {"gradients": "crashed"}) == {}


def test_an_expectation_that_can_never_hold_is_refused():
    config = make_config()
    config.expect = [ExpectationConfig(gradients="synchronized")]
    with pytest.raises(WrongUse, match="gradients: 'synchronized' is unknown; write one of: synced, sharded"):
        check_expectations(config)


def test_expectations_for_another_torch_or_device_do_not_match():
    cell = Cell(wrapper="ddp", path="call")
    expectations = [
        ExpectationConfig(gradients="synced"),
        ExpectationConfig(torch="2.11", gradients="local"),
        ExpectationConfig(device="cuda", gradients="crashed"),
    ]
    assert expected_verdicts(cell, expectations, "2.13.0+cpu", "cpu") == {"gradients": "synced"}
    assert expected_verdicts(cell, expectations, "2.11.0", "cpu") == {"gradients": "local"}
    assert expected_verdicts(cell, expectations, "2.11.0", "cuda") == {"gradients": "crashed"}


def test_modes_are_an_axis():
    config = TrainConfig(wrapper=WrapperConfig(name="ddp"), path=PathConfig(name="call"))
    config.grid = GridConfig(mode=["train", "eval_on_rank_0"])
    assert [cell.label() for cell in expand_grid(config).cells] == ["ddp × call", "ddp × call × eval_on_rank_0"]
