import json
import math
from typing import Any

import pytest

from ddpcall.evidence import Cell, Evidence
from ddpcall.lab.records import TrialRecord, restore_trial
from ddpcall.lab.run_directory import json_safe
from ddpcall.lab.typed import Misfit
from tests.unit.records import FAILURE, make_evidence


def write_and_read(evidence: Evidence, **more: Any) -> Evidence | None:
    line = TrialRecord.of(evidence, {}).to_json() | more
    return restore_trial(json.loads(json.dumps(json_safe(line)))).evidence


def test_evidence_survives_a_round_trip_through_text():
    evidence = make_evidence(failures=(FAILURE,), step_ms=math.inf)
    assert write_and_read(evidence) == evidence


def test_evidence_without_its_parts_survives_the_round_trip():
    evidence = make_evidence(hooks=None, reducer=None, gradients=None, consequence=None, compiled=None)
    assert write_and_read(evidence) == evidence


def test_fields_of_a_later_version_are_left_out_and_missing_ones_refused():
    assert write_and_read(make_evidence(), opinion="good") == make_evidence()
    with pytest.raises(Misfit, match="seed"):
        write_and_read(make_evidence(), seed=None)


def test_labels_name_only_what_is_not_the_default():
    assert Cell(wrapper="ddp", path="call").label() == "ddp × call"
    cell = Cell(wrapper="ddp", path="call", window="no_sync_forward", hooks="late")
    assert cell.label() == "ddp × call × no_sync_forward × late hooks"
