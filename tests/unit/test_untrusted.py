"""Run directories, findings and records of others: read within bounds, and nothing else is read or replaced."""

import io
import json
import os
import stat
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpcall.compare.files import NotARecord, open_run
from ddpcall.compare.program import META
from ddpcall.files import append_text, parse_json, read_text, replace_text
from ddpcall.lab.report.command import main as report
from ddpcall.lab.report.load import load
from ddpcall.lab.report.load_watch import MAX_FINDINGS, load_watch
from ddpcall.lab.run_directory import NotWritten, RunDirectory
from ddpcall.lab.typed import NothingToShow

SECRET = "password: hunter2"


def finding(file: str, line: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "code": "DC101",
        "name": "gradients-not-synchronized",
        "cause": "c",
        "fix": "x",
        "severity": "error",
        "message": "m",
        "file": file,
        "line": line,
        "function": "f",
        "ranks": [0],
        "parameters": [],
        "step": 1,
        "count": 1,
        **changes,
    }


def write_findings(path: Path, *findings: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"schema": 1, "findings": list(findings)}))
    return path


def make_page(directory: Path, file: str) -> str:
    """Make the page of a findings file that names a source file, and return it with what was said."""
    out = directory / "page.html"
    assert report([write_findings(directory / "f.json", finding(file))], out=out, open_it=False, form="html") == 0
    return out.read_text()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory, with a secret in it and one beside it."""
    inside = tmp_path / "here"
    inside.mkdir()
    for place in (inside / "secret.txt", tmp_path / "secret.py", tmp_path / "secret.txt"):
        place.write_text(f"{SECRET}\n")
    monkeypatch.chdir(inside)
    return inside


@pytest.mark.parametrize(
    "file",
    ["/proc/self/environ", "/etc/passwd", "../secret.py", "secret.txt", "link.py", "fifo.py", "\0", "a" * 5000],
)
def test_a_page_never_shows_a_file_that_is_no_source_of_the_run(here, monkeypatch, file):
    monkeypatch.setenv("SECRET_OF_THIS_TEST", SECRET)
    (here / "link.py").symlink_to("../secret.py")
    os.mkfifo(here / "fifo.py")
    page = make_page(here, file)
    assert "DC101" in page
    assert SECRET not in page
    assert "root:" not in page


@pytest.mark.parametrize("file", ["train.py", "package/train.py"])
def test_a_page_shows_python_below_the_working_directory(here, file):
    (here / "package").mkdir()
    (here / file).write_text("loss = model.module(inputs)\n")
    assert "model.module(inputs)" in make_page(here, file)
    assert "model.module(inputs)" in make_page(here, str(here / file))


def test_a_million_findings_are_cut_and_that_is_said(tmp_path):
    many = [finding("train.py", line) for line in range(1, MAX_FINDINGS + 2)]
    record = load_watch(write_findings(tmp_path / "f.json", *many))
    assert len(record.findings) == MAX_FINDINGS
    assert record.problems == (f"f.json: the first {MAX_FINDINGS} of {MAX_FINDINGS + 1} findings are shown",)


@pytest.mark.parametrize("text", ['{"findings": [1' + "0" * 400 + "]}", "[" * 100_000, "\0", "{", "3"])
def test_json_that_is_none_of_ours_is_one_sentence(tmp_path, text):
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(NothingToShow, match=r"f\.json"):
        load(path)


def test_a_lone_surrogate_can_be_written_down(tmp_path):
    path = write_findings(tmp_path / "f.json", finding("train.py", message="\ud800", function="\udfff"))
    for form in ("html", "md", "json"):
        assert report([path], out=tmp_path / "out", open_it=False, form=form) == 0


def test_aliases_of_aliases_do_not_grow(tmp_path):
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / "summary.json").write_text('{"schema": 1, "outcome": "ok"}')
    layers = "\n".join(f"- &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    for place in (run / "config.yaml", run / ".hydra" / "overrides.yaml"):
        place.write_text(f"- &a0 [x]\n{layers}\n")
    began = time.monotonic()
    record: Any = load(run)
    assert time.monotonic() - began < 10
    assert any("aliases" in problem for problem in record.problems)


@pytest.mark.parametrize(
    "name", ["summary.json", "evidence.jsonl", "steps.jsonl", "timeline.jsonl", "config.yaml"]
)
@pytest.mark.parametrize("kind", ["fifo", "link", "device", "directory"])
def test_a_run_directory_is_not_left_by_reading_it(tmp_path, name, kind):
    run = tmp_path / "run"
    run.mkdir()
    (run / "summary.json").write_text('{"schema": 1, "outcome": "ok", "experiment": "e"}')
    (run / name).unlink(missing_ok=True)
    secret = tmp_path / "secret"
    secret.write_text('{"schema": 1, "outcome": "ok", "experiment": "hunter2"}')
    match kind:
        case "fifo":
            os.mkfifo(run / name)
        case "link":
            (run / name).symlink_to(secret)
        case "device":
            (run / name).symlink_to("/dev/zero")
        case "directory":
            (run / name).mkdir()
    try:
        shown = repr(load(run))
    except NothingToShow as error:
        shown = str(error)
    assert "hunter2" not in shown


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind, capsys):
    place, target = tmp_path / "out", tmp_path / "target"
    target.write_text("mine")
    if kind == "fifo":
        os.mkfifo(place)
    else:
        place.symlink_to(target)
    before = os.lstat(place).st_mode
    findings = write_findings(tmp_path / "f.json", finding("train.py"))
    assert report([findings], out=place, open_it=False, form="html") == 2
    assert "which is not replaced" in capsys.readouterr().err
    for write in (replace_text, append_text):
        with pytest.raises(OSError, match="not replaced"):
            write(place, "theirs")
    assert os.lstat(place).st_mode == before
    assert target.read_text() == "mine"


@pytest.mark.skipif(not stat.S_ISCHR(os.stat("/dev/null").st_mode), reason="no /dev/null")
def test_a_device_is_not_replaced():
    with pytest.raises(OSError, match="not replaced"):
        replace_text(Path("/dev/null"), "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_run_directory_follows_no_link_that_lies_in_wait(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / "evidence.jsonl").symlink_to(target)
    with pytest.raises(NotWritten, match="not replaced"):
        RunDirectory(run).append("evidence.jsonl", [{"a": 1}])
    assert target.read_text() == "mine"


def test_reading_is_bounded(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no room
    with pytest.raises(OSError, match="larger than 1000 bytes"):
        read_text(path, 1000)


def write_meta(directory: Path, **changes: Any) -> Path:
    (directory / "rank0").mkdir(parents=True)
    meta = {"schema": 1, "num_ranks": 1, "steps": [0], "run": "r", "failure": "", "ddpcall": "0", **changes}
    (directory / "rank0" / META).write_text(json.dumps(meta))
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"num_ranks": 10**12},
        {"num_ranks": -1},
        {"num_ranks": None},
        {"run": []},
        {"failure": {}},
        {"steps": ["../../x"]},
        {"steps": 3},
    ],
)
def test_a_record_of_impossible_size_is_refused(tmp_path, changes):
    with pytest.raises(NotARecord):
        open_run(write_meta(tmp_path / "record", **changes))


def test_a_record_that_unpacks_without_end_and_a_pickle_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpcall.compare.files.MAX_STEP_BYTES", 10**6)
    run = open_run(write_meta(tmp_path / "record"))
    step = tmp_path / "record" / "rank0" / "step00000000.npz"
    with zipfile.ZipFile(step, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("record.npy", b"\0" * 10**7)
    with pytest.raises(NotARecord, match="unpacks to more than"):
        run.load(0)
    stream = io.BytesIO()
    np.savez(stream, record=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    step.write_bytes(stream.getvalue())
    with pytest.raises(NotARecord, match="allow_pickle"):
        run.load(0)


# ---- anything at all ----

hypothesis: Any = pytest.importorskip("hypothesis")
st: Any = pytest.importorskip("hypothesis.strategies")
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner), max_leaves=12
)
quick = hypothesis.settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def damaged(whole: Any) -> Any:
    """Return a strategy of objects like this one, of which some fields are anything."""
    return st.dictionaries(st.sampled_from(sorted(whole)), trees, max_size=3).map(
        lambda changes: {**whole, **changes}
    )


@quick
@hypothesis.given(found=st.lists(damaged(finding("train.py")) | trees, max_size=3), watched=trees)
def test_any_findings_file_is_a_page_or_one_sentence(tmp_path_factory, found, watched):
    directory = tmp_path_factory.mktemp("any")
    path = directory / "f.json"
    path.write_text(json.dumps({"schema": 1, "findings": found, "watched": watched}))
    assert report([path], out=directory / "page.html", open_it=False, form="html") in (0, 2)


SUMMARY = {
    "schema": 1,
    "experiment": "e",
    "outcome": "ok",
    "environment": {},
    "num_trials": 1,
    "trials": [],
    "stacks": {},
}
STEP = {"wrapper": "ddp", "path": "call", "rank": 0, "step": 0, "loss": 1.0, "step_ms": 1.0}


@quick
@hypothesis.given(
    summary=damaged(SUMMARY),
    steps=st.lists(damaged(STEP) | trees, max_size=3),
    evidence=st.lists(trees, max_size=2),
    tail=st.binary(max_size=40),
)
def test_any_run_directory_is_a_page_or_one_sentence(tmp_path_factory, summary, steps, evidence, tail):
    run = tmp_path_factory.mktemp("any")
    (run / "summary.json").write_text(json.dumps(summary))
    for name, lines in (("steps.jsonl", steps), ("evidence.jsonl", evidence), ("timeline.jsonl", evidence)):
        (run / name).write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + tail)
    (run / "config.yaml").write_bytes(tail)
    assert report([run], out=run / "page.html", open_it=False, form="html") in (0, 2)


@quick
@hypothesis.given(
    changes=st.dictionaries(st.sampled_from(["schema", "num_ranks", "steps", "run", "failure"]), trees)
)
def test_any_record_is_read_or_refused(tmp_path_factory, changes):
    directory = tmp_path_factory.mktemp("any") / "record"
    try:
        open_run(write_meta(directory, **changes))
    except NotARecord:
        return


@quick
@hypothesis.given(text=st.text(max_size=60) | trees.map(json.dumps))
def test_any_text_is_json_or_a_value_error(text):
    try:
        json.dumps(parse_json(text), ensure_ascii=False).encode()
    except ValueError:
        return
