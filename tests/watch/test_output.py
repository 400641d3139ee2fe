"""What people and other tools are shown: the terminal, GitHub Actions, SARIF, the pages of `ddpcall explain`."""

import io
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace

import pytest

from ddpcall.findings import Place
from ddpcall.watch.output.github import append_summary, render_annotation, render_summary
from ddpcall.watch.output.sarif import to_sarif
from ddpcall.watch.output.source_line import read_source_line
from ddpcall.watch.output.terminal import print_findings
from ddpcall.watch.output.watched import Watched, WatchedModel, read_watched, weigh
from tests.watch.test_findings_file import FINDING

SOURCE = """\
for x in data:
    loss = ddp.module(x)  # the bypass
    loss, other = first(x), second(x)  # two
    ddp.module.head = nn.Linear(4, 4)
    ddp.module(
        x,
    )
    größe = "ü"; ddp.module(größe)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("line", "marked"),
    [
        (2, "ddp.module(x)"),
        (3, "loss, other = first(x), second(x)"),
        (4, "ddp.module.head = nn.Linear(4, 4)"),
        (5, "ddp.module("),
        (6, "x,"),
        (8, "ddp.module(größe)"),
    ],
)
def test_the_mark_is_under_the_call_or_under_the_lines_code(script, line, marked):
    source = read_source_line(str(script), line)
    assert source is not None
    assert source.text[source.start : source.end] == marked
    assert source.text == SOURCE.splitlines()[line - 1].strip()


def test_no_line_is_shown_of_what_is_no_text_file(tmp_path, script):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 9)
    (tmp_path / "large").write_text("x = 1\n" * 400_000)
    for name in ("pipe", "binary", "large", "missing", "."):
        assert read_source_line(str(tmp_path / name), 1) is None
    assert read_source_line(str(script), 99) is None


def test_a_line_cannot_steer_the_terminal(tmp_path):
    (tmp_path / "train.py").write_text('print("\x1b[2J")\n')
    source = read_source_line(str(tmp_path / "train.py"), 1)
    assert source is not None
    assert "\x1b" not in source.text


def test_in_a_pipe_each_paragraph_is_one_line_without_color(script, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.chdir(script.parent)
    stream = io.StringIO()
    long = "a long message, " * 20
    print_findings(
        [replace(FINDING, file=str(script), line=2, message=long, parameters=("w",))],
        "ddpcall watch: 1 error",
        stream,
    )
    assert stream.getvalue().splitlines() == [
        "error[DC101] gradients-not-synchronized",
        " --> train.py:2 in main",
        "  |",
        "2 | loss = ddp.module(x)  # the bypass",
        "  |        ^^^^^^^^^^^^^",
        "  |",
        f"   {long}",
        "   ranks 0 · first in step 2 · seen 1×",
        "   parameters: w",
        "   write instead: write this",
        "",
        "ddpcall watch: 1 error",
    ]


def in_terminal(code, columns=80, **environment):
    """Run Python code with its output going to a terminal; return what arrives there."""
    controller, terminal = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=terminal,
        stderr=terminal,
        env={**clean, "TERM": "xterm", "COLUMNS": str(columns), **environment},
    ) as process:
        os.close(terminal)
        text = b""
        while True:
            try:
                part = os.read(controller, 65536)
            except OSError:  # the other end was closed
                break
            if not part:
                break
            text += part
    os.close(controller)
    assert process.returncode == 0, text
    return text.decode().replace("\r\n", "\n")


PRINTING = """
import sys
from dataclasses import replace
from ddpcall.findings import Finding
from ddpcall.watch.output.terminal import print_findings
from ddpcall.watch.output.watched import Watched, WatchedModel, read_watched, weigh
message = "a message with words that are not to be broken " * 4
finding = Finding(code="DC101", name="gradients-not-synchronized", severity="error", message=message,
                  file="{file}", line=2, function="main", ranks=(0, 1), step=1, parameters=("weight",),
                  cause="inner", fix="write this " * 20)
print_findings([finding], "ddpcall watch: 1 error", sys.stderr)
"""


def test_a_terminal_of_80_columns_gets_whole_words_in_color(script):
    script.write_text("\nloss = ddp.module(" + "x, " * 60 + ")\n")
    text = in_terminal(PRINTING.format(file=script))
    plain = in_terminal(PRINTING.format(file=script), NO_COLOR="1")
    assert "\x1b[1;31merror" in text
    assert "\x1b[31m" not in plain
    shown = plain.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    lines = [line for line in shown.splitlines() if "-->" not in line and str(script) not in line]
    assert max(map(len, lines)) <= 80
    assert " ".join(shown.split()).count("words that are not to be broken") == 4
    (line,) = [line for line in lines if line.startswith("2 | loss = ddp.module(x, x")]
    assert line.endswith("…")


def test_an_annotation_names_line_and_title_and_escapes_what_github_reads(monkeypatch):
    monkeypatch.setenv("GITHUB_WORKSPACE", "/checkout")
    finding = replace(FINDING, file="/checkout/a,b:c/train.py", message="100%\nof it")
    assert render_annotation(finding) == (
        "::error file=a%2Cb%3Ac/train.py,line=3,title=DC101 gradients-not-synchronized"
        "::100%25%0Aof it%0AWrite instead: write this"
    )
    assert render_annotation(replace(FINDING, line=0, severity="note")).startswith("::notice title=DC101 ")


def test_an_annotation_of_a_librarys_line_is_on_the_users_and_names_both(monkeypatch):
    monkeypatch.setenv("GITHUB_WORKSPACE", "/checkout")
    caller = Place("/checkout/train.py", 40, "main")
    inside = render_annotation(replace(FINDING, file="/checkout/hook.py", called_from=caller))
    assert inside.startswith("::error file=hook.py,line=3,")
    library = render_annotation(replace(FINDING, file="/env/site-packages/lib/foo.py", called_from=caller))
    assert library.startswith("::error file=train.py,line=40,")
    assert library.endswith("%0AAt lib/foo.py:3 in main, called from /checkout/train.py:40 in main")


def test_the_summary_is_a_table_that_no_message_breaks(monkeypatch, tmp_path):
    finding = replace(FINDING, message="a | b\n<script>")
    table = render_summary([finding], "ddpcall watch: 1 error").splitlines()
    assert table[2] == "ddpcall watch: 1 error"
    assert table[-2].startswith("| DC101 gradients-not-synchronized (error) | ")
    assert r"a \| b &lt;script>" in table[-2]
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    (tmp_path / "summary").write_text("what was there\n")
    append_summary([finding], "the end")
    assert (tmp_path / "summary").read_text().startswith("what was there\n### ddpcall watch\n\nthe end\n")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    append_summary([finding], "no runner: nothing is written")


def fingerprints(script, *lines):
    log = to_sarif([replace(FINDING, file=str(script), line=line) for line in lines], Watched())
    return [result["partialFingerprints"]["ddpcall/v1"] for result in log["runs"][0]["results"]]


def test_fingerprints_stay_when_lines_move_and_tell_lines_apart(script):
    before = fingerprints(script, 3, 2)
    assert len(set(before)) == 2
    script.write_text("import torch\n\n" + SOURCE)
    assert fingerprints(script, 5, 4) == before
    script.write_text("\n" + SOURCE.replace("first(x)", "third(x)"))
    assert fingerprints(script, 4, 3)[0] != before[0]
    assert fingerprints(script, 4, 3)[1] == before[1]
    script.write_text("same(x)\nsame(x)\n")
    assert len(set(fingerprints(script, 1, 2))) == 2


def test_sarif_names_the_tools_version_and_a_page_for_every_rule():
    driver = to_sarif([], Watched())["runs"][0]["tool"]["driver"]
    assert driver["version"]
    assert driver["informationUri"].endswith(driver["version"])
    assert all(rule["helpUri"].startswith("https://") for rule in driver["rules"])


def test_sarif_of_a_librarys_line_has_the_users_as_a_related_location(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    caller = Place(str(tmp_path / "train.py"), 40, "main")
    log = to_sarif([replace(FINDING, file="/env/lib/foo.py", called_from=caller), FINDING], Watched())
    with_caller, without = log["runs"][0]["results"]
    (related,) = with_caller["relatedLocations"]
    assert related["physicalLocation"] == {"artifactLocation": {"uri": "train.py"}, "region": {"startLine": 40}}
    assert related["message"]["text"] == "called from here"
    assert with_caller["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "file:///env/lib/foo.py"
    assert "relatedLocations" not in without


@pytest.mark.parametrize(("steps", "succeeded", "level"), [(30, True, "note"), (0, False, "error")])
def test_sarif_tells_no_findings_from_nothing_found_out(steps, succeeded, level):
    watched = Watched(
        attached=True,
        ranks=(0, 1),
        world_size=2,
        models=(WatchedModel("Net", "ddp", steps),),
        optimizer_steps=steps,
        process_group=2,
        ended=True,
    )
    (run,) = json.loads(json.dumps(to_sarif([], watched)))["runs"]
    (invocation,) = run["invocations"]
    (notification,) = invocation["toolExecutionNotifications"]
    assert (invocation["executionSuccessful"], notification["level"]) == (succeeded, level)
    assert notification["message"]["text"] == weigh(watched).text
    assert read_watched(run["properties"]["ddpcall"]["watched"]) == watched


EXPLAIN = "import sys; from ddpcall.cli import main; main(['explain', 'DC101'])"


def test_explain_renders_its_page_in_a_terminal_and_prints_markdown_into_a_pipe():
    rendered = in_terminal(EXPLAIN)
    piped = subprocess.run([sys.executable, "-c", EXPLAIN], capture_output=True, text=True, check=True).stdout
    assert piped.startswith("# DC101 gradients-not-synchronized\n")
    assert "DC101 gradients-not-synchronized" in rendered
    assert "\x1b[" in rendered
    assert "**" not in rendered
