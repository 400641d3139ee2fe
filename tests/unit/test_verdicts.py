import dataclasses

import pytest

from ddpcall.evidence import CompiledEvidence
from ddpcall.verdicts import judge, judge_compiled, judge_gradients, judge_hooks, skipped_kinds
from tests.unit.records import ENVIRONMENT, FAILURE, make_evidence, make_gradients, make_hook


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


def test_one_rank_proves_nothing_about_synchronisation():
    alone = dataclasses.replace(ENVIRONMENT, world_size=1)
    assert judge_gradients(make_evidence(environment=alone)) == "local"


def test_a_failure_is_a_crash_and_says_nothing_of_compiled_code():
    compiled = CompiledEvidence(requested=True, frames=1, calls_compiled=2, calls_eager=0)
    verdicts = judge(make_evidence(failures=(FAILURE,), compiled=compiled))
    assert (verdicts.gradients, verdicts.compiled) == ("crashed", "none")


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
