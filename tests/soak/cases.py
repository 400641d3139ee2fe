"""One case of the soak: drawn from its seed, run on forked ranks, and compared with what is promised."""

import json
import random
import re
import signal
import tempfile
from pathlib import Path

from ddpcall.watch.output.watched import read_watched, weigh
from tests.ranks.forked_lab import LabRun
from tests.ranks.processes import wait_until_gone
from tests.watch.launched import ForkedLauncher

BOUND_S = 60.0  # of a launch on a busy machine; one takes 0.5 to 5 s
PROGRAM = Path(__file__).with_name("program.py").read_text()
WAIT_S = 1.5
STEPS = 6

# What each wrapper can be used wrongly for.
MISTAKES = {
    "ddp": ["none", "none", "bypass", "other rate"],
    "replicate": ["none", "none", "forward", "other rate"],
    "hand": ["none", "not reduced"],  # another rate is not found there: who averages by hand is not compared
}
MOMENTS = [
    "before torch", "before the group", "before the model", "before training",
    *[f"step {step}: {place}" for step in range(STEPS) for place in
      ("before forward", "after forward", "in backward", "after backward", "after the update")],
    "before the end of the group", "at the end", "in an exit handler",
]  # fmt: skip
# The training is as without them.
HARMLESS = {
    "none",
    "pause",
    "stdout_gone",
    "stderr_gone",
    "stderr_full",
    "file_gone",
    "other_directory",
    "agent_gone",
}
SIGNALS = {
    "kill": signal.SIGKILL, "stop_and_kill": signal.SIGKILL, "segv": signal.SIGSEGV,
    "terminate": signal.SIGTERM, "interrupt": signal.SIGINT,
}  # fmt: skip
CODES = {name: -number for name, number in SIGNALS.items()} | {
    "raise": 1, "exit_5": 5, "exit_text": 1, "hard_3": 3,
}  # fmt: skip
FAULTS = sorted({*HARMLESS, *CODES, "exit_0", "hard_0"})


# How a run of the lab ends, by its fault, where it is of one rank.
OUTCOMES = {
    "none": "ok", "kill": "rank lost", "stop": "hung", "raise": "failed", "raise_bare": "failed", "exit": "failed",
    "interrupt": "failed", "agent_gone": "failed", "terminate_all": "interrupted", "close_out": "ok",
}  # fmt: skip
BLOCKED = ["kill", "stop", "agent_gone", "terminate_all"]  # what can happen to a rank while it waits or saves


def draw(seed):
    """Return the case of a seed: four of the watch, then one of the lab."""
    chance = random.Random(f"soak {seed}")
    if seed % 5 == 4:
        point = chance.choice(["forward", "backward", "collective", "save"])
        return {
            "seed": seed,
            "kind": "lab",
            "fault": chance.choice(BLOCKED if point in ("collective", "save") else sorted(OUTCOMES)),
            "point": point,
            "step": chance.randint(1, 8),
            "victim": chance.choice([0, 1]),
        }
    wrapper = chance.choice(sorted(MISTAKES))
    fault, moment, victim = chance.choice(FAULTS), chance.choice(MOMENTS), chance.choice([0, 1, "all"])
    if fault in ("exit_0", "hard_0") and moment in MOMENTS[:2]:
        victim = "all"  # torch waits half an hour for a rank that leaves in peace before it has come
    return {
        "seed": seed,
        "kind": "watch",
        "ranks": chance.choice([2, 2, 2, 3]),
        "wrapper": wrapper,
        "mistake": chance.choice(MISTAKES[wrapper]),
        "from_step": chance.randrange(STEPS),
        "fault": fault,
        "moment": moment,
        "victim": victim,
        "options": chance.choice([[], [], ["--every", "2"], ["--fail-on", "never"], ["--sarif", "f.sarif"]]),
    }


class Soak:
    """Runs cases, one after the other, on ranks that one process forks."""

    def __enter__(self):
        self._launcher = ForkedLauncher("lab").__enter__()
        return self

    def __exit__(self, *error):
        self._launcher.__exit__(*error)

    def run(self, case):
        """Run a case, and return each promise that it broke."""
        with tempfile.TemporaryDirectory(prefix="soak") as directory:
            run = self._run_lab if case["kind"] == "lab" else self._run
            return run(case, Path(directory))

    def _run_lab(self, case, directory):
        try:
            done = LabRun(
                self._launcher, directory, "checkpoint.every=3", "trial_timeout_s=5", fault=case["fault"],
                point=case["point"], victim=case["victim"], STEP=str(case["step"]),
            )  # fmt: skip
        except AssertionError as error:
            return [str(error)]
        broken = list(check_lab(case, done))
        if left := wait_until_gone(directory, 5.0):
            broken.append(f"left behind: {left}")
        return [*broken, f"codes {done.codes}", _without_frames(done.err)] if broken else []

    def _run(self, case, directory):
        (directory / "train.py").write_text(PROGRAM)
        answer = self._launcher.launch(
            {
                "arguments": ["watch", "--json", "f.json", *case["options"], "train.py", json.dumps(case)],
                "directory": str(directory),
                "ranks": case["ranks"],
                "wait_s": WAIT_S,
            },
            BOUND_S,
        )
        err = (directory / "err").read_text(errors="replace")
        if answer is None:
            return [f"no end within {BOUND_S:.0f} s", err[-2000:]]
        broken = list(check(case, directory, answer["codes"], err))
        if left := wait_until_gone(directory, 5.0):
            broken.append(f"left behind: {left}")
        return (
            [*broken, f"codes {answer['codes']}, {answer['seconds']:.1f} s", _without_frames(err)]
            if broken
            else []
        )


def check(case, directory, codes, err):
    """Yield what is not as promised."""
    fault = case["fault"]
    try:
        answer = json.loads((directory / "f.json").read_text())
    except FileNotFoundError:
        answer = None
        if fault != "file_gone" and case["moment"] != "before torch":
            yield "there is no findings file"
    found = _sites(answer)
    yield from _check_codes(case, codes)
    for path in directory.glob("before*.json"):
        if lost := _sites(json.loads(path.read_text())) - found:
            yield f"lost since the fault: {lost}"
    is_never = "never" in case["options"]
    if not any(codes) and not is_never:
        if found:
            yield f"false green: {found}"
        elif answer is not None:
            watched = read_watched(answer["watched"])
            if not weigh(watched).is_evidence or len(watched.ranks) < case["ranks"] or not watched.optimizer_steps:
                yield f"false green: {weigh(watched).text}"
        if case["mistake"] != "none" and fault in HARMLESS:
            yield f"false green: {case['mistake']}"
    yield from _check_words(case, err, found)


def check_lab(case, done):
    """Yield what a run of the lab did not keep."""
    expected, summary = OUTCOMES[case["fault"]], done.summary()
    if summary["outcome"] != expected:
        yield f"the outcome is {summary['outcome']}, not {expected}: {summary['reason']}"
    if expected in ("rank lost", "hung") and summary["first_failing_rank"] != case["victim"]:
        yield f"rank {summary['first_failing_rank']} is named, not {case['victim']}"
    if any(done.codes) == (expected == "ok"):
        yield "the exit code does not tell"
    if len([line for line in done.said if " was here when " not in line]) > 1:
        yield f"{len(done.said)} messages"


def _sites(answer):
    return {(finding["code"], finding["line"]) for finding in (answer or {}).get("findings", [])}


def _check_codes(case, codes):
    """A rank leaves as without the watch, but where the answer is no; its launcher may stop it first."""
    if case["fault"] == "agent_gone":
        return  # nobody notes them
    if len(codes) != case["ranks"] and case["fault"] not in ("pause", "stop_and_kill"):  # they have helpers
        yield f"{len(codes)} exit codes of {case['ranks']} ranks"
        return
    for rank, code in enumerate(codes[: case["ranks"]]):
        own = CODES.get(case["fault"]) if case["victim"] in (rank, "all") else None
        allowed = {own, 0, 1, 2, -signal.SIGTERM} if own is None else {own, -signal.SIGTERM}
        if own is not None and case["moment"].startswith("in "):
            allowed |= {0, 1, 2}  # Python swallows what an exit handler or a hook raises, or wraps it
        if own is not None and case["victim"] == "all":
            allowed |= {1}  # in a collective with one that has left already
        if code not in allowed:
            yield f"rank {rank} left with {code}, not one of {sorted(allowed, key=str)}"


def _check_words(case, err, found):
    if "an error of its own" in err or re.search(r'File ".*/ddpcall/(watch|cli)', err):
        yield "an error of the watch's own"
    said = re.findall(r"^ddpcall: (DC\d+)", err, re.MULTILINE)
    for code in set(said):
        if said.count(code) > max(1, sum(code == each for each, _ in found)):
            yield f"{code} was said {said.count(code)} times"
    if (num_lists := len(re.findall(r"^ddpcall watch: .*(no findings|finding)", err, re.MULTILINE))) > 1:
        yield f"{num_lists} answers"


def _without_frames(err):
    return "\n".join(line for line in err.splitlines() if not line.startswith(("frame #", "Exception raised")))[
        -3000:
    ]
