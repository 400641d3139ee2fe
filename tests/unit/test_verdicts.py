import dataclasses

import pytest

from ddpcall.compare import CAUSES
from ddpcall.evidence import CompiledEvidence, HooksOfStep, ModesEvidence, StepTimeline, TimelineEvent
from ddpcall.lab.records import RunRecord, TrialRecord
from ddpcall.lab.report.markdown import write_truth
from ddpcall.lab.report.page import render_page
from ddpcall.lab.report.terminal import STYLES, lay_out
from ddpcall.lab.report.truth import build_table
from ddpcall.lab.report.view import build_view
from ddpcall.lab.truth_table import verdict_table
from ddpcall.mixing import SHAPES
from ddpcall.verdicts import (
    ONE_PROCESS,
    VERDICTS,
    VerdictSpec,
    Word,
    explain_crash,
    judge,
    judge_compiled,
    judge_gradients,
    judge_hooks,
    judge_mixing,
    judge_skipped,
    list_untimed,
    skipped_kinds,
)
from tests.unit.records import ENVIRONMENT, FAILURE, make_evidence, make_gradients, make_hook, make_mixing


@pytest.mark.parametrize(
    ("gradients", "verdict"),
    [
        (make_gradients(), "synced"),
        (make_gradients(max_difference=(0.0, 0.1)), "local"),
        (make_gradients(max_difference=(0.1, 0.0)), "local"),
        (make_gradients(max_difference=(1e-7, 0.0)), "synced"),
        (make_gradients(with_gradient=0), "none"),
        (make_gradients(batches_differ=False), "local"),
        (None, "none"),
    ],
)
def test_gradients_are_synced_only_when_equal_in_every_step_from_different_batches(gradients, verdict):
    assert judge_gradients(make_evidence(gradients=gradients)) == verdict


def test_one_rank_proves_nothing_about_synchronization():
    alone = dataclasses.replace(ENVIRONMENT, world_size=1)
    assert judge_gradients(make_evidence(environment=alone)) == "local"


@pytest.mark.parametrize(
    ("gradients", "verdict"),
    [
        (make_gradients(max_difference=(0.1, 0.1)), "no data parallelism"),
        (make_gradients(batches_differ=False), "no data parallelism"),
        # What was measured wins over what the wrapper is declared to be.
        (make_gradients(), "synced"),
        (make_gradients(with_gradient=0), "none"),
    ],
)
def test_a_wrapper_without_data_parallelism_has_nothing_to_lose(gradients, verdict):
    assert judge_gradients(make_evidence(gradients=gradients, data_parallel=False)) == verdict


@pytest.mark.parametrize(
    ("evidence", "verdict"),
    [
        ({"mixing": make_mixing("averaged", "averaged")}, "averaged"),
        ({"mixing": make_mixing("averaged", "late")}, "late"),
        ({"mixing": make_mixing("local", "averaged")}, "local"),
        ({"mixing": None}, "none"),
        ({"mixing": None, "failures": (FAILURE,)}, "crashed"),
        # Nothing joins the ranks; unless it was measured that something does.
        ({"mixing": make_mixing("local"), "data_parallel": False}, "no data parallelism"),
        ({"mixing": make_mixing("unidentifiable"), "data_parallel": False}, "no data parallelism"),
        ({"mixing": None, "data_parallel": False}, "no data parallelism"),
        ({"mixing": make_mixing("averaged"), "data_parallel": False}, "averaged"),
        # No parameter received a gradient: there was none, or it never reached the optimizer.
        ({"mixing": make_mixing("unidentifiable"), "gradients": make_gradients(with_gradient=0)}, "none"),
        ({"mixing": make_mixing("thrown_away"), "gradients": make_gradients(with_gradient=0)}, "thrown_away"),
    ],
)
def test_the_mixing_verdict_is_the_first_shape_that_is_not_the_mean(evidence, verdict):
    assert judge_mixing(make_evidence(**evidence)) == verdict


def test_a_failure_is_a_crash_and_says_nothing_of_compiled_code():
    compiled = CompiledEvidence(requested=True, frames=1, calls_compiled=2, calls_eager=0)
    verdicts = judge(make_evidence(failures=(FAILURE,), compiled=compiled))
    assert (verdicts["gradients"], verdicts["compiled"]) == ("crashed", "none")


@pytest.mark.parametrize(
    ("hooks", "verdict"),
    [
        ([make_hook("inner")], "fired"),
        ([make_hook("inner"), make_hook("inner", "full_backward", fired=0)], "skipped"),
        ([make_hook("inner", fired=0)], "skipped"),
        ([make_hook("inner", fired=0, forwards=0), make_hook("submodules")], "skipped"),
        ([make_hook("inner", fired=0, forwards=0)], "none"),
        ([make_hook("wrapped")], "none"),
    ],
)
def test_hooks_are_skipped_only_beside_a_forward_that_ran(hooks, verdict):
    assert judge_hooks(make_evidence(hooks=tuple(hooks)), "inner") == verdict


def test_submodules_whose_forward_never_ran_do_not_count():
    used, unused = make_hook("submodules"), make_hook("submodules", fired=0, forwards=0, module="spare")
    assert judge_hooks(make_evidence(hooks=(used, unused)), "submodules") == "fired"


def test_hooks_of_submodules_are_skipped_when_only_their_weights_were_used():
    inner, weights = make_hook("inner"), make_hook("submodules", fired=0, forwards=0)
    assert judge_hooks(make_evidence(hooks=(inner, weights)), "submodules") == "skipped"


def test_skipped_kinds_are_named():
    hooks = (make_hook("wrapped", "forward_pre"), make_hook("wrapped", "full_backward", fired=0))
    assert skipped_kinds(make_evidence(hooks=hooks), "wrapped") == ["full_backward"]


@pytest.mark.parametrize(
    ("requested", "calls", "verdict"),
    [(True, (2, 0), "compiled"), (True, (1, 1), "eager"), (True, (0, 2), "eager"), (False, (0, 2), "none")],
)
def test_compiled_means_in_every_step(requested, calls, verdict):
    compiled = CompiledEvidence(requested=requested, frames=1, calls_compiled=calls[0], calls_eager=calls[1])
    assert judge_compiled(make_evidence(compiled=compiled)) == verdict


def make_modes(**changes):
    base = ModesEvidence(
        training_modules=(6, 6),
        num_modules=6,
        flags_differ=(),
        dropout_kept=(0.5, 0.5),
        masks_identical=(True, True),
        statistics_difference=(0.0, 0.0),
        batches_tracked=(1, 2),
        compute_dtypes=("float32",),
        result_dtype="float32",
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("changes", "name", "word"),
    [
        ({}, "modes", "train"),
        ({"training_modules": (0, 0)}, "modes", "eval"),
        ({"training_modules": (5, 5)}, "modes", "mixed"),
        ({"flags_differ": ("dropout",)}, "modes", "differs"),
        ({}, "dropout", "identical"),
        ({"masks_identical": (True, False)}, "dropout", "different"),
        ({"masks_identical": (None, None)}, "dropout", "none"),
        ({}, "statistics", "same"),
        ({"statistics_difference": (0.5, 0.1)}, "statistics", "differ"),
        ({"statistics_difference": (0.5, 0.0)}, "statistics", "same"),
        ({"statistics_difference": (None, None)}, "statistics", "none"),
        ({"evaluation_inner": 0.25}, "evaluation_inner", "differ"),
        ({"evaluation_inner": 0.0}, "evaluation_inner", "same"),
        ({}, "evaluation_wrapped", "none"),
        ({}, "precision", "float32"),
        ({"compute_dtypes": ("bfloat16", "float32")}, "precision", "mixed"),
        ({"compute_dtypes": ()}, "precision", "none"),
    ],
)
def test_modes(changes, name, word):
    assert judge(make_evidence(modes=make_modes(**changes)))[name] == word


def test_sharded_gradients_are_not_called_synced_or_local():
    assert judge(make_evidence(gradients=make_gradients(sharded=("weight",))))["gradients"] == "sharded"


MIXED = dataclasses.replace(FAILURE, message="aten.addmm got mixed torch.Tensor and DTensor, need to convert")


def test_a_crash_is_explained_only_beside_skipped_hooks():
    skipped = (make_hook("wrapped", fired=0), make_hook("inner"))
    fired = (make_hook("wrapped"), make_hook("inner"))
    assert "passed by" in (explain_crash(make_evidence(failures=(MIXED,), hooks=skipped)) or "")
    assert explain_crash(make_evidence(failures=(MIXED,), hooks=fired)) is None
    assert explain_crash(make_evidence(failures=(FAILURE,), hooks=skipped)) is None
    assert explain_crash(make_evidence(hooks=skipped)) is None


def test_a_backward_hook_has_nothing_to_fire_for_without_gradients():
    hooks = (make_hook("wrapped"), make_hook("wrapped", "full_backward", fired=0, forwards=0))
    assert judge(make_evidence(hooks=hooks))["hooks_wrapped"] == "fired"
    hooks = (make_hook("wrapped"), make_hook("wrapped", "full_backward", fired=0, forwards=2))
    assert judge(make_evidence(hooks=hooks))["hooks_wrapped"] == "skipped"


NAMES = {"wrapped": "DDP", "inner": "Net", "submodule": "head"}


def make_hooks_of_step(owner, kind, fired=1, forwards=1):
    name = NAMES[owner]
    return HooksOfStep(
        kind=kind,
        name=f"{kind} of {name}",
        module=name,
        owner=owner,
        functions=("f",),
        fired=fired,
        forwards=forwards,
    )


def make_timeline(wrapped=(1, 1), inner=(1, 1), submodule=(1, 1), backward=True, **changes):
    """Return a step of a model with all three kinds of hooks; (fired, forwards) by owner."""
    counts = {"wrapped": wrapped, "inner": inner, "submodule": submodule}
    hooks = []
    for kind in ("forward_pre", "forward", "full_backward"):
        on = kind != "full_backward" or backward
        hooks += [
            make_hooks_of_step(owner, kind, fired * on, forwards * on)
            for owner, (fired, forwards) in counts.items()
        ]
    return StepTimeline(**{"step": 2, "events": (), "hooks": tuple(hooks), **changes})


def skipped_of(timeline):
    return [(skipped.kind, skipped.owner, skipped.name) for skipped in judge_skipped(timeline)]


HOOKS_OF_DDP = [
    ("pre_hook", "wrapped", "forward_pre of DDP"),
    ("hook", "wrapped", "forward of DDP"),
    ("hook", "wrapped", "full_backward of DDP"),
]
HOOKS_OF_BOTH = [
    ("pre_hook", "wrapped", "forward_pre of DDP"),
    ("pre_hook", "inner", "forward_pre of Net"),
    ("hook", "wrapped", "forward of DDP"),
    ("hook", "inner", "forward of Net"),
    ("hook", "wrapped", "full_backward of DDP"),
    ("hook", "inner", "full_backward of Net"),
]
FORWARD_OF_DDP = ("forward", "wrapped", "DDP")
ENTERED_INNER = TimelineEvent(kind="forward", name="Net", owner="inner", start_us=0, end_us=1)


@pytest.mark.parametrize(
    ("timeline", "skipped"),
    [
        (make_timeline(), []),
        (make_timeline(wrapped=(0, 1)), HOOKS_OF_DDP),
        (make_timeline(wrapped=(0, 0)), [FORWARD_OF_DDP, *HOOKS_OF_DDP]),
        (
            make_timeline(wrapped=(0, 0), inner=(0, 0)),
            [FORWARD_OF_DDP, ("forward", "inner", "Net"), *HOOKS_OF_BOTH],
        ),
        (make_timeline(submodule=(0, 0)), []),  # nobody says that it should have run
        (make_timeline(wrapped=(0, 0), inner=(0, 0), submodule=(0, 0)), []),  # nothing ran at all
        (make_timeline(wrapped=(0, 1), backward=False), HOOKS_OF_DDP[:2]),
        (make_timeline(arrivals=(6, 0)), []),
        (make_timeline(arrivals=(2, 4)), [("bucket", None, "reduction of 4 gradients")]),
        (make_timeline(compiled_runs=3), []),
        (make_timeline(compiled_runs=0), [("forward", "wrapped", "compiled code")]),
        (make_timeline(with_gradient=2), []),
        (make_timeline(with_gradient=0), [("optimizer", None, "update of the parameters")]),
        (
            make_timeline(wrapped=(0, 0), inner=(0, 0), raised=True, compiled_runs=0, events=(ENTERED_INNER,)),
            [FORWARD_OF_DDP, HOOKS_OF_BOTH[0], HOOKS_OF_BOTH[1]],
        ),
    ],
)
def test_a_step_went_past_what_its_counts_show(timeline, skipped):
    assert skipped_of(timeline) == skipped


def test_every_word_that_can_be_measured_is_declared():
    assert set(SHAPES) <= set(VERDICTS["mixing"].words)
    assert {*CAUSES, "crashed"} == set(ONE_PROCESS)
    tones = {word.tone for spec in VERDICTS.values() for word in spec.words.values()}
    assert tones - {"none"} == set(STYLES)


def test_a_new_verdict_is_one_entry(monkeypatch, tmp_path):
    """Judged, expected, shown in every rendering, with its evidence, and spoken of, without another file."""
    spec = VerdictSpec(
        title="buffers",
        meaning="whether buffers parted",
        judge=lambda evidence: "parted" if evidence.replicas and evidence.replicas.buffers else "none",
        part="replicas",
        words={"parted": Word("lost", "part the buffers"), "none": Word()},
    )
    monkeypatch.setitem(VERDICTS, "buffers", spec)
    trial = TrialRecord.of(make_evidence(), {"buffers": "kept"})
    assert trial.unmet == {"buffers": {"expected": "kept", "measured": "parted"}}
    (row,) = build_table([trial]).rows
    (cell,) = [cell for cell in row.cells if cell.name == "buffers"]
    assert (cell.word, cell.tone, cell.expected) == ("parted", "lost", "kept")
    assert ("initial digest", "00") in next(part.facts for part in row.evidence if part.name == "buffers")
    header, ((*_, last, _, _, _),) = lay_out([trial])
    assert (header[-4], str(last), last.style) == ("buffers", "parted", "bold red")
    assert "| **parted** (expected kept) |" in write_truth(build_table([trial]))
    assert "**parted**" in verdict_table({"trials": [trial.summarize()]})
    view = build_view([RunRecord(path=tmp_path, trials=(trial,))])
    page = render_page(view)
    assert '<th scope="col">buffers</th>' in page
    assert "parted (expected kept)" in page


def test_hooks_that_fired_without_an_event_are_listed_and_no_others():
    seen = TimelineEvent(kind="hook", name="forward of Net", owner="inner", start_us=0, end_us=1)
    timeline = StepTimeline(
        step=0,
        events=(seen,),
        hooks=(
            make_hooks_of_step("inner", "forward"),
            make_hooks_of_step("wrapped", "forward"),
            make_hooks_of_step("submodule", "forward", fired=0),
        ),
    )
    assert [hooks.name for hooks in list_untimed(timeline)] == ["forward of DDP"]
