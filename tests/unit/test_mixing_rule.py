"""The rule of the mixing matrix: what becomes a finding, over whole sequences of measured steps."""

from typing import Any

import numpy as np
import pytest

from ddpcall.mixing.judge import judge_records
from ddpcall.mixing.record import NO_GRADIENT, PRESENT, UNREAD, Column, RankSketches
from ddpcall.taps import CallSite
from ddpcall.watch.rules.mixing import PATIENCE_STEPS, MixingRule, Where

STEP, MADE = CallSite("train.py", 20, "main"), CallSite("train.py", 10, "main")
MEAN = np.full((2, 2), 0.5)
OWN = np.eye(2)
FIRST = np.array([[1.0, 0.0], [1.0, 0.0]])


class Known:
    """What the run knows on this rank; a test says otherwise."""

    def __init__(self, **facts):
        self.inside = self.reduced = frozenset({"weight", "bias"})
        self.sharded = frozenset()
        self.is_compared = self.is_explained = lambda name: False
        self.confirm = lambda names: []
        self.num_sent = lambda: None
        self.withdrawn = []
        self.book = self
        self.withdraw = self.withdrawn.append
        self.found = []
        self.report = self.found.append
        vars(self).update(facts)


class Run:
    """Ranks whose gradients are mixed by a matrix; their weights are digests before and after it."""

    def __init__(self, **facts):
        self.known: Any = Known(**facts)
        self.found = self.known.found
        self.rule = MixingRule(self.known)
        self.rng = np.random.default_rng(0)
        self.steps = 0

    def step(
        self,
        matrix,
        before=(1, 1),
        after=(2, 2),
        names=("weight", "bias"),
        optimizer=0,
        made=MADE,
        state=PRESENT,
        has_own=True,
        shares_out=False,
    ):
        self.steps += 1
        own = self.rng.standard_normal((len(matrix), len(names), 64))
        used = np.einsum("ij,jpb->ipb", matrix, own) * (state == PRESENT)
        count = len(names)
        empty = ((),) * count
        records = [
            RankSketches(
                rank,
                names=names,
                numel=(64,) * count,
                dtypes=("float32",) * count,
                used=used[rank],
                states=(state,) * count,
                own=own[rank] if has_own else np.zeros((0, 64)),
                columns=tuple(Column(index, 0) for index in range(count if has_own else 0)),
                carry=np.zeros((count, 64)),
                before=np.full(count, before[rank]),
                after=np.full(count, after[rank]),
                own_parts=empty,
                own_sum=empty,
                own_unit=empty,
                used_parts=empty,
                weight_parts=empty,
                steps_of=(1,) * count,
                num_steps=1,
            )
            for rank in range(len(matrix))
        ]
        where = Where(self.steps, optimizer, STEP, made, shares_out)
        self.rule.judge(where, records, judge_records(records))
        return self

    def codes(self):
        self.rule.close()
        return [(finding.code, finding.line, finding.step) for finding in self.found]


def test_the_mean_is_certified_and_silent():
    run = Run()
    for _ in range(3):
        run.step(MEAN)
    assert run.codes() == []
    certificate = run.rule.certificate
    assert (certificate.steps, certificate.shapes, certificate.ranks) == (3, {"averaged": 3}, 2)
    assert certificate.residual < 1e-6
    matrix: Any = certificate.matrix
    assert np.allclose(matrix, 0.5)


@pytest.mark.parametrize(("matrix", "shape"), [(2 * MEAN, "summed"), (0.3 * MEAN, "scaled")])
def test_a_sum_and_a_multiple_are_facts_and_no_findings(matrix, shape):
    run = Run().step(matrix)
    assert run.codes() == []
    assert run.rule.certificate.shapes == {shape: 1}


def test_local_gradients_are_harm_once_weights_part_for_good():
    run = Run(inside=frozenset())
    run.step(OWN, before=(1, 1), after=(2, 3))
    run.step(OWN, before=(2, 3), after=(4, 5))
    assert run.found == [], "the script may average the weights yet"
    assert run.codes() == [("DC101", MADE.line, 1)]
    (finding,) = run.found
    assert finding.parameters == ("weight", "bias")
    assert finding.ranks == (0, 1)


def test_weights_that_are_equal_again_were_averaged():
    run = Run(inside=frozenset())
    run.step(OWN, before=(1, 1), after=(2, 3)).step(OWN, before=(2, 3), after=(4, 5))
    run.step(OWN, before=(6, 6), after=(7, 8))
    assert run.codes() == []


def test_weights_that_may_have_been_averaged_after_the_last_step_accuse_nobody():
    local: dict[str, Any] = {"before": (1, 1), "after": (2, 3)}
    assert Run(num_sent=lambda: 128).step(OWN, **local).codes() == []
    assert [code for code, _, _ in Run(num_sent=lambda: 127).step(OWN, **local).codes()] == ["DC101"]


def test_a_ranks_own_weights_are_no_replicas():
    assert Run().step(OWN, before=(1, 2), after=(3, 4)).codes() == []


def test_patience_ends_where_the_script_sends_nothing():
    run = Run(inside=frozenset())
    run.step(OWN, before=(1, 1), after=(2, 3))
    run.steps = PATIENCE_STEPS
    run.step(OWN, before=(2, 3), after=(4, 5))
    assert [finding.code for finding in run.found] == ["DC101"]


@pytest.mark.parametrize(
    ("options", "code"),
    [({"sharded": {"weight", "bias"}}, "DC106"), ({}, "DC101")],
)
def test_what_a_wrapper_holds_is_told_from_what_stands_beside_it(options, code):
    assert Run(**options).step(OWN, before=(1, 1), after=(2, 3)).codes() == [(code, STEP.line, 1)]


def test_a_finding_with_a_line_is_not_said_again():
    run = Run(is_explained=lambda name: name == "weight").step(OWN, before=(1, 1), after=(2, 3))
    run.rule.close()
    assert [finding.parameters for finding in run.found] == [("bias",)]


def test_what_sensors_suspected_is_confirmed_at_once_and_withdrawn_where_weights_are_averaged():
    run = Run(confirm=lambda names: names)
    run.step(OWN, before=(1, 1), after=(2, 3))
    assert run.known.withdrawn == []
    run.step(OWN, before=(4, 4), after=(5, 6))
    assert run.known.withdrawn == ["weight", "bias"]


@pytest.mark.parametrize(("share", "codes"), [(1e-5, []), (0.1, ["DC101"])])
def test_a_gradient_that_no_backward_computed_is_judged_by_its_size(share, codes):
    run = Run()
    run.step(np.array([[1, 0], [1 + share, 0]]), before=(1, 1), after=(2, 3), has_own=False)
    assert [code for code, _, _ in run.codes()] == codes


def test_a_rank_that_is_left_out_counts_the_second_time():
    run = Run().step(FIRST)
    assert run.found == []
    assert run.step(FIRST).codes() == [("DC107", STEP.line, 1)]
    assert Run().step(FIRST).step(MEAN).codes() == []


def test_an_optimizer_that_uses_nothing_is_found_where_it_was_made():
    run = Run().step(MEAN, after=(1, 1), state=NO_GRADIENT)
    assert run.step(MEAN, after=(1, 1), state=NO_GRADIENT).codes() == [("DC109", MADE.line, 1)]
    used_once = Run().step(MEAN)
    for _ in range(3):
        used_once.step(MEAN, after=(1, 1), state=NO_GRADIENT)
    assert used_once.codes() == [], "gradients that are cleared for a while"


def test_replicas_that_began_apart_are_found_unless_their_weights_are_compared_anyway():
    apart: dict[str, Any] = {"before": (1, 2), "after": (3, 4)}
    assert Run().step(MEAN, **apart).codes() == [("DC201", STEP.line, 1)]
    assert Run(is_compared=lambda name: True).step(MEAN, **apart).codes() == []


def test_groups_that_never_meet():
    pairs = np.kron(np.eye(2), MEAN)
    assert Run().step(pairs, before=(1,) * 4, after=(2, 2, 3, 3)).codes() == [("DC106", STEP.line, 1)]
    assert Run().step(pairs, before=(1, 1, 2, 2), after=(3, 3, 4, 4)).codes() == [], "each group's own shards"


def test_an_inner_loop_trains_copies_that_are_thrown_away():
    run = Run(inside=frozenset())
    for number in range(2):
        names = (f"weight (of optimizer {number})",)
        run.step(
            OWN,
            before=(1, 1),
            after=(2, 3),
            names=names,
            optimizer=10 + number,
            made=CallSite("train.py", 5, "main"),
        )
        run.step(MEAN, before=(4, 4), after=(5, 5))
    assert run.codes() == []


def test_a_step_that_some_ranks_did_not_take_together_is_left_out():
    run = Run().step(OWN, before=(1, 1), after=(2, 3), state=UNREAD)
    assert run.codes() == []
    assert run.rule.certificate.shapes.get("local") is None


def test_shares_that_each_rank_steps_alone_are_harm_though_the_weights_stay_equal():
    run = Run()
    for _ in range(3):
        run.step(OWN, before=(1, 1), after=(2, 2), shares_out=True)
    assert run.codes() == [("DC107", STEP.line, 1)]
    assert Run().step(MEAN, shares_out=True).step(MEAN, shares_out=True).codes() == []


@pytest.mark.parametrize(("inside", "advice"), [(True, "register_comm_hook"), (False, "Wrap the model")])
def test_where_all_is_local_the_advice_depends_on_whether_it_is_wrapped(inside, advice):
    names = frozenset({"weight", "bias"}) if inside else frozenset()
    run = Run(inside=names, reduced=names)
    run.step(OWN, before=(1, 1), after=(2, 3)).step(OWN, before=(2, 3), after=(4, 5))
    assert [code for code, _, _ in run.codes()] == ["DC101"]
    assert advice in run.found[0].fix


def test_that_weights_differ_is_explained_while_it_is_waited_for_them_to_be_averaged():
    run = Run()
    run.step(OWN, before=(1, 1), after=(2, 3))
    assert run.known.will_explain()
    run.step(OWN, before=(4, 4), after=(5, 5))
    assert not run.known.will_explain()
    assert run.codes() == []


def test_what_was_put_into_a_wrapped_model_later_is_told_from_what_its_reducer_owns():
    run = Run(reduced=frozenset()).step(OWN, before=(1, 1), after=(2, 3)).step(OWN, before=(2, 3), after=(4, 5))
    assert [code for code, _, _ in run.codes()] == ["DC102"]
