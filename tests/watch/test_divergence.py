"""Comparisons become findings: a pure function, tested as one."""

from dataclasses import replace
from typing import Any

from ddpcall.findings import CATALOGUE, Finding, Severity
from ddpcall.taps import NOWHERE, CallSite
from ddpcall.watch.rules.replicas import Divergence, judge_buffers, judge_same, judge_steps
from ddpcall.watch.sensors.last_sites import BufferUse

SITE = CallSite("train.py", 12, "step")


def codes(divergence: Divergence, explained: bool = False) -> list[str]:
    return [finding.code for finding in divergence.judge(explained)]


def test_unexplained_divergence_names_the_odd_ranks():
    divergence = Divergence(4, {"parameters": ((0, 1, 3), (2,))}, parameters=("w",))
    (finding,) = divergence.judge(False)
    assert (finding.code, finding.ranks, finding.step, finding.parameters) == ("DC201", (2,), 4, ("w",))


def test_of_two_halves_neither_is_the_odd_one():
    (finding,) = Divergence(1, {"parameters": ((0,), (1,))}).judge(False)
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


GROUPS = ((0,), (1,))


def test_each_part_has_its_code_and_line():
    cases: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("optimizer", "DC203", {"optimizer_site": SITE}),
        ("optimizer", "DC208", {"scaler_site": SITE, "settings": {"loss scale": {0: 4096.0, 1: 1024.0}}}),
        ("modes", "DC204", {"mode_site": SITE, "modules": {"drop": {0: "eval", 1: "train"}}}),
    )
    for part, code, sites in cases:
        (finding,) = Divergence(2, {part: GROUPS}, **sites).judge(False)
        assert (finding.code, finding.line) == (code, 12)
    same = [judge_same(part, 2, 2, SITE) for part in ("batch", "rng")]
    found = [judge_steps(4, GROUPS, {0: 3, 1: 5}, SITE), statistics("evaluated"), *same]
    assert [(each.code, each.line) for each in found] == [(f"DC{code}", 12) for code in (502, 205, 206, 207)]
    assert [each.ranks for each in found] == [(0, 1)] * 4


def statistics(use: str, change: CallSite = NOWHERE, has_own: bool = False) -> Finding:
    return judge_buffers(BufferUse(SITE, 2, use), GROUPS, ("mean",), 0.0, change, has_own)


def test_statistics_that_are_no_batch_norms_are_to_be_reduced():
    norms, own = statistics("evaluated"), statistics("evaluated", has_own=True)
    assert "SyncBatchNorm before wrapping" in norms.fix
    assert "thrown away" not in norms.message
    assert "`dist.all_reduce(count)`" in own.fix
    assert "thrown away" in own.message
    assert (own.severity, statistics("saved").severity) == (CATALOGUE["DC205"].severity, Severity.NOTE)


def test_statistics_are_told_on_the_line_that_changes_them_where_it_was_seen():
    own = statistics("saved", replace(SITE, line=7), has_own=True)
    assert own.line == 7
    assert "When the model is saved at train.py:12" in own.message


def test_scales_and_steps_are_told_by_rank():
    groups = ((0,), (1,))
    settings = {"loss scale": {0: 4096.0, 1: 1024.0}, "group 0 lr": {0: 0.1, 1: 0.2}}
    rate, scale = sorted(
        Divergence(2, {"optimizer": groups}, settings=settings).judge(False),
        key=lambda finding: finding.code,
    )
    assert "group 0 lr" in rate.message
    assert "loss scale" not in rate.message
    assert "4096 on rank 0, 1024 on rank 1" in scale.message
    apart = judge_steps(4, ((0, 2), (1,)), {0: 3, 1: 5, 2: 3}, SITE)
    assert "rank 1 took 5 steps, rank 0 took 3 steps" in apart.message
    assert apart.ranks == (1,)
