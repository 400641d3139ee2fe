"""Comparisons become findings: a pure function, tested as one."""

from dataclasses import replace
from typing import Any

from ddpcall.taps import CallSite
from ddpcall.watch.rules.replicas import Divergence, diagnose_divergence

SITE = CallSite("train.py", 12, "step")


def codes(divergence: Divergence, explained: bool = False) -> list[str]:
    return [finding.code for finding in diagnose_divergence(divergence, explained)]


def test_unexplained_divergence_names_the_odd_ranks():
    divergence = Divergence(4, {"parameters": ((0, 1, 3), (2,))}, parameters=("w",))
    (finding,) = diagnose_divergence(divergence, explained=False)
    assert (finding.code, finding.ranks, finding.step, finding.parameters) == ("DC201", (2,), 4, ("w",))


def test_of_two_halves_neither_is_the_odd_one():
    (finding,) = diagnose_divergence(Divergence(1, {"parameters": ((0,), (1,))}), explained=False)
    assert finding.ranks == (0, 1)


def test_divergence_is_not_said_twice():
    parameters = {"parameters": ((0,), (1,))}
    assert codes(Divergence(1, parameters), explained=True) == []
    assert codes(Divergence(1, {"optimizer": ((0,), (1,)), **parameters})) == ["DC203"]
    assert codes(Divergence(1, parameters, load_site=SITE), explained=False) == ["DC202"]


def test_optimizers_that_each_have_a_share_are_no_finding_where_the_replicas_are_kept_equal():
    shares = {"group 0 parameters": {0: 2, 1: 1}}
    groups = {"optimizer": ((0,), (1,))}
    assert codes(Divergence(1, groups, settings=shares)) == []
    apart = {**groups, "parameters": ((0,), (1,))}
    assert codes(Divergence(1, apart, settings=shares)) == ["DC203"]
    assert codes(Divergence(1, apart, settings=shares), explained=True) == []
    rates = {**shares, "group 0 lr": {0: 0.1, 1: 0.2}}
    assert codes(Divergence(1, groups, settings=rates), explained=True) == ["DC203"]


def test_each_part_has_its_code_and_line():
    groups = ((0,), (1,))
    cases: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("optimizer", "DC203", {"optimizer_site": SITE}),
        ("optimizer", "DC208", {"scaler_site": SITE, "settings": {"loss scale": {0: 4096.0, 1: 1024.0}}}),
        ("steps", "DC502", {"step_site": SITE, "settings": {"steps": {0: 3, 1: 5}}}),
        ("modes", "DC204", {"mode_site": SITE, "modules": {"drop": {0: "eval", 1: "train"}}}),
        ("buffers", "DC205", {"buffer_site": SITE, "buffer_use": "evaluated"}),
        ("batch", "DC206", {"forward_site": SITE}),
        ("rng", "DC207", {"forward_site": SITE}),
    )
    for part, code, sites in cases:
        (finding,) = diagnose_divergence(Divergence(2, {part: groups}, **sites), explained=False)
        assert (finding.code, finding.line) == (code, 12)


def test_statistics_that_are_no_batch_norms_are_to_be_reduced():
    buffers = Divergence(2, {"buffers": ((0,), (1,))}, buffer_site=SITE, buffer_use="evaluated")
    (norms,) = diagnose_divergence(buffers, explained=False)
    (own,) = diagnose_divergence(replace(buffers, has_own_statistics=True), explained=False)
    assert "SyncBatchNorm before wrapping" in norms.fix
    assert "thrown away" not in norms.message
    assert "`dist.all_reduce(count)`" in own.fix
    assert "thrown away" in own.message


def test_statistics_are_told_on_the_line_that_changes_them_where_it_was_seen():
    changed = replace(SITE, line=7)
    buffers = Divergence(2, {"buffers": ((0,), (1,))}, buffer_site=SITE, buffer_use="saved", change_site=changed)
    (own,) = diagnose_divergence(replace(buffers, has_own_statistics=True), explained=False)
    assert own.line == 7
    assert "When the model is saved at train.py:12" in own.message


def test_scales_and_steps_are_told_by_rank():
    groups = ((0,), (1,))
    settings = {"loss scale": {0: 4096.0, 1: 1024.0}, "group 0 lr": {0: 0.1, 1: 0.2}}
    rate, scale = sorted(
        diagnose_divergence(Divergence(2, {"optimizer": groups}, settings=settings), explained=False),
        key=lambda finding: finding.code,
    )
    assert "group 0 lr" in rate.message
    assert "loss scale" not in rate.message
    assert "4096 on rank 0, 1024 on rank 1" in scale.message
    steps = {"steps": {0: 3, 1: 5, 2: 3}}
    (apart,) = diagnose_divergence(Divergence(2, {"steps": ((0, 2), (1,))}, settings=steps), explained=False)
    assert "rank 1 took 5 steps, rank 0 took 3 steps" in apart.message
    assert apart.ranks == (1,)
