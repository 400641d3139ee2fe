"""Events and comparisons become findings: a pure function, tested as one."""

from typing import Any

import pytest

from ddpcall.findings import Finding, Place
from ddpcall.taps import CallSite
from ddpcall.watch.advice import Advice
from ddpcall.watch.events import Event, EventKind
from ddpcall.watch.rules.diagnose import CODES, Divergence, diagnose, diagnose_divergence

SITE = CallSite("train.py", 12, "step")
FACTS = {
    EventKind.HOOKS_SKIPPED: {"module": "Net", "hooks": "1 forward hook"},
    EventKind.STALE_WEIGHT: {"module": "Linear", "hook": "WeightNorm", "name": "weight"},
    EventKind.COMPILED_BYPASSED: {"module": "Net"},
    EventKind.LATE_HOOK: {"module": "ReLU"},
    EventKind.PRECISION_LOST: {"module": "Net", "precision": "bf16"},
    EventKind.OUTSIDE: {"count": 2},
    EventKind.SHARDED_BYPASSED: {"module": "Net", "error": "got mixed torch.Tensor and DTensor"},
}


@pytest.mark.parametrize("kind", list(EventKind))
def test_every_event_becomes_a_finding_at_its_site(kind):
    finding = diagnose(Event(kind, SITE, 3, ("w", "b"), (), FACTS.get(kind, {"model": "Net"})))
    assert (finding.code, finding.cause) == (CODES[kind], kind.value)
    assert (finding.file, finding.line, finding.function) == ("train.py", 12, "step")
    assert (finding.ranks, finding.step, finding.parameters) == ((), 3, ("w", "b"))
    assert "{" not in finding.message
    assert len(finding.message) > 40


def test_a_window_without_effect_is_only_a_warning():
    assert diagnose(Event(EventKind.NO_SYNC_WITHOUT_EFFECT, SITE)).severity == "warning"
    assert diagnose(Event(EventKind.SYNC_OFF, SITE)).severity == "error"


def test_other_lines_of_the_same_forward_are_named():
    others = (CallSite("train.py", 14, "step"), CallSite("train.py", 13, "step"))
    event = Event(EventKind.BYPASSED, SITE, 1, ("w",), others, {"model": "Net"})
    assert "(and lines 13, 14)" in diagnose(event).message


def bypassed(was_called: bool = False, **facts: Any) -> Finding:
    return diagnose(
        Event(EventKind.BYPASSED, SITE, 1, ("w",), (), {"model": "Net", "was_called": was_called, **facts})
    )


def test_where_the_wrapper_was_never_called_the_message_says_what_is():
    advice = Advice("`loss = ddp(x)`.", "policy", "ddp")
    finding = bypassed(advice=advice)
    wrapper = "its DistributedDataParallel wrapper `ddp` was never called."
    assert finding.message.startswith(f"`policy` (Net) is called here; {wrapper}")
    assert finding.fix == "`loss = ddp(x)`."
    assert bypassed().message.startswith(
        "Net is called here; its DistributedDataParallel wrapper was never called."
    )
    part = bypassed(advice=Advice("", "net.enc", "ddp", is_part=True))
    assert part.message.startswith("`net.enc` (a part of Net) is called here;")
    assert "past its `replicate` hook." in bypassed(was_called=True, is_replicate=True).message
    assert "entered Net here through `policy`, past its" in bypassed(was_called=True, advice=advice).message


def test_a_module_that_is_handed_to_a_library_is_told_as_that():
    finding = bypassed(advice=Advice("`fit(ddp)`.", "ddp.module", "ddp", is_handed_over=True))
    wrapper = "its DistributedDataParallel wrapper `ddp`."
    assert finding.message.startswith(f"`ddp.module` (Net) is handed over here, and is called past {wrapper}")


def test_advice_falls_back_to_the_general_one_with_the_wrappers_name_where_it_is_known():
    assert bypassed().fix.startswith("Call the wrapper: `loss = ddp(batch)`. To train through another method")
    assert bypassed(advice=Advice(wrapper="self.model")).fix.startswith("Call the wrapper: `self.model(...)`. To")


def test_of_several_lines_none_is_written_anew_alone():
    others = (CallSite("train.py", 14, "step"),)
    facts = {"model": "Net", "advice": Advice("`h = ddp(x)`.", "net.enc", "ddp")}
    fix = diagnose(Event(EventKind.BYPASSED, SITE, 1, ("w",), others, facts)).fix
    assert fix == "Let `forward` do what these lines do, and call the wrapper, `ddp`, once."


def test_a_librarys_line_is_not_the_users_to_change():
    site = CallSite("/env/lib/python3.11/site-packages/trl/trainer/dpo.py", 7, "loss", CallSite("t.py", 3, "main"))
    finding = diagnose(Event(EventKind.BYPASSED, site, 1, ("w",), (), {"model": "Net"}))
    assert finding.fix.endswith("The line is trl's: override it in code of your own, or report it there.")
    assert finding.called_from == Place("t.py", 3, "main")


def test_a_backward_inside_the_wrapped_forward_is_told_with_its_line():
    backward = CallSite("train.py", 11, "learn")
    facts = {"model": "Net", "backward": backward}
    finding = diagnose(Event(EventKind.IN_FORWARD, SITE, 1, ("codes",), (), facts))
    assert finding.message.startswith("Net ran a backward (line 11) inside its wrapper's forward.")
    assert finding.fix.startswith("Average the gradients of that backward before the step")
    at_backward = diagnose(Event(EventKind.IN_FORWARD, backward, 1, ("codes",), (), facts))
    assert at_backward.message.startswith("Net ran a backward here inside its wrapper's forward.")


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
