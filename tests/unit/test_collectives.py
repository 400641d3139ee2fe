from ddpcall.evidence import ReducerEvidence
from ddpcall.probes.collectives import CollectivesObserver, count_all_reduces


def entry(record_id: int, time_ns: int, name: str = "gloo:all_reduce") -> dict:
    return {"record_id": record_id, "time_created_ns": time_ns, "profiling_name": name}


def test_all_reduces_are_counted_between_the_marks_and_other_collectives_are_not():
    entries = [entry(0, 5), entry(1, 12), entry(2, 13), entry(3, 14, "gloo:broadcast"), entry(4, 25), entry(5, 99)]
    assert count_all_reduces(entries, [10, 20, 30, 40]) == [2, 1, 0]


def test_steps_that_left_the_ring_buffer_are_unknown():
    assert count_all_reduces([entry(7, 25), entry(8, 35)], [10, 20, 30, 40]) == [None, None, 1]


def test_a_dropped_past_before_the_first_step_changes_nothing():
    assert count_all_reduces([entry(7, 5), entry(8, 15)], [10, 20]) == [1]


def reducer(*arrivals: int) -> ReducerEvidence:
    return ReducerEvidence(
        reducers=1, armings=(0,) * len(arrivals), arrivals_armed=arrivals, arrivals_unarmed=(0,) * len(arrivals)
    )


def test_the_witness_can_disagree_with_the_reducer_probe():
    observer = CollectivesObserver({})
    observer._marks_ns = [10, 20, 30]
    entries = [entry(0, 15)]
    agreeing, disagreeing = observer.compare(entries, reducer(4, 0)), observer.compare(entries, reducer(4, 4))
    assert agreeing is not None
    assert agreeing.agrees
    assert disagreeing is not None
    assert not disagreeing.agrees
