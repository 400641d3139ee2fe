"""What a script prints, reads and leaves with is byte for byte what it is without the watch."""

import re
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.ranks.lab_process import clean_environment

TIMEOUT_S = 240
PYTHON = [sys.executable, "-u"]
WATCH = [*PYTHON, "-m", "ddpcall", "watch", "--fail-on", "never"]  # most of the scripts have nothing to watch
SAID_AT_THE_END = re.compile(r"ddpcall watch: (no findings|nothing was watched|nothing could be found out): .*\n")


def start(command, directory, **extra):
    return subprocess.Popen(
        command,
        cwd=directory,
        env=clean_environment(**extra),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def same_as_bare(directory, *arguments, given="", **extra):
    """Run a program bare and under the watch, side by side, and compare all that can be seen of it.

    Returns:
        Exit code, stdout and stderr of the bare run.
    """
    started = [start([*command, *arguments], directory, **extra) for command in (PYTHON, WATCH)]
    ended = []
    for process in started:
        with process:
            ended.append((*process.communicate(given, TIMEOUT_S), process.returncode))
    bare, watched = ended
    own, said = SAID_AT_THE_END.subn("", watched[1])
    assert (watched[2], watched[0], own) == (bare[2], bare[0], bare[1])
    assert said == 1 or bare[2] < 0, watched[1]
    return bare[2], bare[0], bare[1]


# Each script: what it is, what it must show when it runs bare (so that the comparison compares something).
SCRIPTS = {
    "raises_in_a_function": (
        """
        def inner(n):
            raise ValueError(f"own {n}")
        def outer():
            try:
                inner(1)
            except ValueError as error:
                raise KeyError("second") from error
        print("before")
        outer()
        """,
        1,
        "KeyError: 'second'",
    ),
    "raises_while_handling": (
        """
        try:
            1 / 0
        except ZeroDivisionError:
            [][1]
        """,
        1,
        "During handling of the above exception",
    ),
    "exception_group": (
        "raise ExceptionGroup('both', [ValueError(1), KeyError(2)])",
        1,
        "Exception Group Traceback",
    ),
    "syntax_error": ("print('never')\ndef broken(:\n    pass\n", 1, "SyntaxError: invalid syntax"),
    "coding_cookie": ("# -*- coding: latin-1 -*-\nprint('fine')\n", 0, "fine"),
    "exit_5": ("import sys\nprint('x')\nsys.exit(5)", 5, "x"),
    "exit_text": ("import sys\nsys.exit('because')", 1, "because"),
    "exit_object": ("import sys\nsys.exit(['a', 1])", 1, "['a', 1]"),
    "exit_none": ("raise SystemExit", 0, ""),
    "exit_256": ("import sys\nsys.exit(256)", 0, ""),
    "hard_exit_0": ("import os\nprint('x')\nos._exit(0)", 0, "x"),
    "hard_exit_3": ("import os\nos._exit(3)", 3, ""),
    "dies_by_a_signal": ("import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)", -signal.SIGUSR1, ""),
    "interrupted": ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
    "help": (
        """
        import argparse
        parser = argparse.ArgumentParser(description="a trainer")
        parser.add_argument("--json", help="its own")
        parser.parse_args(["--help"])
        """,
        0,
        "usage: help.py [-h] [--json JSON]",
    ),
    "wrong_arguments": (
        "import argparse\nargparse.ArgumentParser().parse_args(['--nonsense'])",
        2,
        "unrecognized",
    ),
    "warns": ("import warnings\nwarnings.warn('careful')\nwarnings.warn('old', DeprecationWarning)", 0, "careful"),
    "own_excepthook": (
        """
        import sys
        sys.excepthook = lambda kind, error, trace: print("mine", kind.__name__, error, trace.tb_lineno)
        raise ValueError("v")
        """,
        1,
        "mine ValueError v 4",
    ),
    "excepthook_that_exits": (
        """
        import sys
        def hook(*_):
            sys.exit(7)
        sys.excepthook = hook
        raise ValueError("v")
        """,
        7,
        "",
    ),
    "excepthook_that_fails": (
        """
        import sys
        def hook(*_):
            raise RuntimeError("in the hook")
        sys.excepthook = hook
        raise ValueError("v")
        """,
        1,
        "Original exception was",
    ),
    "exit_handlers": (
        """
        import atexit, sys, threading
        atexit.register(print, "registered first, runs last")
        atexit.register(print, "registered last, runs first")
        class Late:
            def __del__(self):
                print("deleted")
        late = Late()
        threading.Thread(target=lambda: print("thread")).start()
        """,
        0,
        "runs first",
    ),
    "itself": (
        '''
        """The docstring."""
        import inspect, pickle, sys
        from dataclasses import dataclass, field
        from typing import get_type_hints
        @dataclass
        class Config:
            rate: "float" = 0.1
            names: list[str] = field(default_factory=list)
        class Thing:
            pass
        number: int = 3
        import __main__
        print(sys.argv, __name__, __file__, __doc__, __package__, __spec__, __cached__, sys.path[0])
        print(type(__loader__).__name__, __loader__.name, __loader__.path, __annotations__)
        print(__builtins__.len is len, sorted(name for name in dir() if name.startswith("__")))
        print(__main__.Thing is Thing, type(pickle.loads(pickle.dumps(Thing()))) is Thing)
        print(Config(), get_type_hints(Config), pickle.loads(pickle.dumps(Config(2.0, ["a"]))))
        print(inspect.getsource(Thing), inspect.getsourcefile(Thing))
        ''',
        0,
        "True True",
    ),
    "guarded": ('if __name__ == "__main__":\n    print("runs")\n', 0, "runs"),
    "reads_stdin": ("import sys\nprint(input('? '), sys.stdin.read())", 0, "first rest"),
    "sets_variables_first": (
        """
        import os, sys
        print("torch" in sys.modules, "numpy" in sys.modules, "rich" in sys.modules)
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch
        print(torch.get_num_threads())
        """,
        0,
        "False False False\n1\n",
    ),
    "processes": (
        """
        import multiprocessing, os, sys
        class Payload:
            def __init__(self, n):
                self.n = n
        def work(queue, payload):
            queue.put((type(payload).__module__, payload.n, __name__, sys.argv[0]))
            if payload.n == 1:
                os._exit(4)
            sys.exit(6)
        if __name__ == "__main__":
            for method in ("spawn", "fork"):
                context = multiprocessing.get_context(method)
                for n in range(2):
                    queue = context.SimpleQueue()
                    child = context.Process(target=work, args=(queue, Payload(n)))
                    child.start()
                    print(queue.get())
                    child.join()
                    print(child.exitcode)
        """,
        0,
        "__mp_main__",
    ),
    "forks": (
        """
        import os, sys
        if os.fork() == 0:
            print("child")
            sys.exit(9)
        print("parent", os.waitstatus_to_exitcode(os.wait()[1]))
        """,
        0,
        "parent 9",
    ),
    "changes_directory": (
        "import os, tempfile\nos.chdir(tempfile.gettempdir())\nprint(__file__)",
        0,
        "changes_directory.py",
    ),
}
SHOWN_BY = {"reads_stdin": "first\nrest"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_as_without_the_watch(tmp_path, name):
    source, code, shown = SCRIPTS[name]
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    bare = same_as_bare(tmp_path, f"{name}.py", "--its", "own", given=SHOWN_BY.get(name, ""))
    assert bare[0] == code
    assert shown in bare[1] + bare[2]


@pytest.mark.parametrize("place", ["./x.py", "sub/../x.py", "sub/link.py", "{absolute}/x.py"])
def test_a_path_is_taken_as_the_interpreter_takes_it(tmp_path, place):
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.py").write_text("import sys\nprint(__file__, sys.argv, sys.path[0])\n1 / 0\n")
    (tmp_path / "sub" / "link.py").symlink_to(tmp_path / "x.py")
    assert same_as_bare(tmp_path, place.format(absolute=tmp_path))[0] == 1


def test_a_safe_path_stays_safe(tmp_path):
    (tmp_path / "x.py").write_text("import sys\nprint(sys.path)\n")
    assert same_as_bare(tmp_path, "x.py", PYTHONSAFEPATH="1")[0] == 0


MODULES = {
    "package/__init__.py": "import sys\nprint('imported', __name__, sys.argv)\n",
    "package/__main__.py": "from . import inner\nprint(inner.NAME, __name__, __package__, __spec__.name)\n",
    "package/inner.py": "import sys\nNAME = __name__\nprint('package.inner', sys.argv)\n",
    "package/train.py": """
import sys
from dataclasses import dataclass
from .inner import NAME
from . import inner
@dataclass
class Config:
    rate: float = 0.1
print(NAME, sys.argv, __name__, __file__, __package__, __spec__.origin, type(__loader__), Config(), sys.path[0])
if "fail" in sys.argv:
    raise LookupError("own")
""",
    "package/broken.py": "def broken(:\n",
    "bare/train.py": "print(__name__)\n",
    "chain.py": """
import runpy, sys
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
""",
}


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["package", "a", "--b"], 0, "package.inner __main__ package package.__main__"),
        (["package.train", "--json", "own"], 0, "package.inner"),
        (["package.train", "fail"], 1, "LookupError: own"),
        (["package.broken"], 1, "SyntaxError"),
        (["package.absent"], 1, "No module named package.absent"),
        (["bare"], 1, "No module named bare.__main__"),
        (["chain", "package/inner.py", "a"], 0, "package.inner"),
        (["chain", "-m", "package.train", "fail"], 1, "LookupError: own"),
    ],
)
def test_a_module_is_as_without_the_watch(tmp_path, arguments, code, shown):
    for name, source in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    bare = same_as_bare(tmp_path, "-m", *arguments)
    assert bare[0] == code
    assert shown in bare[1] + bare[2]


def test_the_watch_runs_inside_a_chain_of_modules(tmp_path):
    for name, source in MODULES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    command = ["-m", "chain", "-m", "ddpcall", "watch", "-m", "package", "a"]
    with start([*PYTHON, *command], tmp_path) as process:
        out, err = process.communicate("", TIMEOUT_S)
    assert out.endswith("package.inner __main__ package package.__main__\n"), err
    assert err.startswith("ddpcall watch: nothing was watched: -m package never imported torch.")
    assert process.returncode == 2


def test_the_comparison_sees_a_difference(tmp_path):
    (tmp_path / "x.py").write_text("import sys\nprint('ddpcall.cli' in sys.modules)\n")
    with pytest.raises(AssertionError, match="True"):
        same_as_bare(tmp_path, "x.py")
