import json

import pytest

from ddpcall.evidence import Cell, from_json, to_json
from tests.unit.records import FAILURE, make_evidence


def test_evidence_survives_a_round_trip_through_text():
    evidence = make_evidence(failures=(FAILURE,))
    assert from_json(json.loads(json.dumps(to_json(evidence)))) == evidence


def test_evidence_without_its_parts_survives_the_round_trip():
    evidence = make_evidence(hooks=None, reducer=None, gradients=None, consequence=None, compiled=None)
    assert from_json(json.loads(json.dumps(to_json(evidence)))) == evidence


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError, match="opinion"):
        from_json({**to_json(make_evidence()), "opinion": "good"})


def test_labels_name_only_what_is_not_the_default():
    assert Cell(wrapper="ddp", path="call").label() == "ddp × call"
    cell = Cell(wrapper="ddp", path="call", window="no_sync_forward", hooks="late")
    assert cell.label() == "ddp × call × no_sync_forward × late hooks"
