"""What rules say: messages, advice and severities, from facts alone."""

from dataclasses import replace

import pytest

from ddpcall.findings import CATALOGUE, Finding, Place
from ddpcall.taps import CallSite
from ddpcall.watch.advice import Advice
from ddpcall.watch.rules.rule import make_finding
from ddpcall.watch.rules.unreduced import Use
from ddpcall.watch.sensors.reducer_state import Cause

SITE = CallSite("train.py", 12, "step")
USE = Use(Cause.BYPASSED, SITE, 3, ("w", "b"), model="Net", was_called=False)


def test_a_finding_has_what_the_catalogue_says_of_its_code():
    finding = make_finding("DC103", "detached", SITE, "It was converted.", step=2, parameters=("w",))
    entry = CATALOGUE["DC103"]
    assert (finding.name, finding.severity, finding.fix) == (entry.name, entry.severity, entry.fix)
    assert (finding.file, finding.line, finding.function) == ("train.py", 12, "step")
    assert (finding.cause, finding.ranks, finding.step, finding.parameters) == ("detached", (), 2, ("w",))


@pytest.mark.parametrize("cause", list(Cause))
def test_every_cause_of_unreduced_gradients_has_a_message_at_its_line(cause):
    finding = replace(USE, cause=cause).explain()
    assert (finding.code, finding.cause) == ("DC104" if cause is Cause.SYNC_OFF else "DC101", cause.value)
    assert (finding.line, finding.step, finding.parameters) == (12, 3, ("w", "b"))
    assert "Net" in finding.message
    assert "optimizer step 3" in finding.message
    assert len({replace(USE, cause=each).explain().message for each in Cause}) == len(Cause)


def test_other_lines_of_the_same_forward_are_named():
    others = (CallSite("train.py", 14, "step"), CallSite("train.py", 13, "step"))
    assert "(and lines 13, 14)" in replace(USE, others=others).explain().message


def bypassed(was_called: bool = False, is_replicate: bool = False, advice: Advice | None = None) -> Finding:
    use = replace(USE, was_called=was_called, is_replicate=is_replicate, advice=advice or Advice())
    return use.explain()


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
    fix = replace(USE, others=others, advice=Advice("`h = ddp(x)`.", "net.enc", "ddp")).explain().fix
    assert fix == "Let `forward` do what these lines do, and call the wrapper, `ddp`, once."


def test_a_librarys_line_is_not_the_users_to_change():
    site = CallSite("/env/lib/python3.11/site-packages/trl/trainer/dpo.py", 7, "loss", CallSite("t.py", 3, "main"))
    finding = replace(USE, site=site).explain()
    assert finding.fix.endswith("The line is trl's: override it in code of your own, or report it there.")
    assert finding.called_from == Place("t.py", 3, "main")


def test_a_backward_inside_the_wrapped_forward_is_told_with_its_line():
    backward = CallSite("train.py", 11, "learn")
    use = replace(USE, cause=Cause.IN_FORWARD, backward=backward)
    finding = use.explain()
    assert finding.message.startswith("Net ran a backward (line 11) inside its wrapper's forward.")
    assert finding.fix.startswith("Average the gradients of that backward before the step")
    at_backward = replace(use, site=backward).explain()
    assert at_backward.message.startswith("Net ran a backward here inside its wrapper's forward.")
