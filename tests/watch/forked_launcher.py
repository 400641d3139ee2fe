"""Starts ranks as torchrun does, but forks them from one process that has imported torch: half a second a launch.

`python -m tests.watch.forked_launcher` reads one request a line from stdin and answers with one line:
{"arguments": [...], "directory": ..., "ranks": 2, "wait_s": 2.0, "afterwards": [[1, 18]]} starts
`python -m ddpcall ARGUMENTS` on the ranks and answers {"codes": [...], "seconds": ...}; what they print is
in `out` and `err` in the directory.

Per launch there is an agent, the ranks' parent, which hosts their store and ends them all when one fails: by
SIGTERM, and by SIGKILL those that are there `GRACE_S` later, as one that is stopped is.
One rank alone is started as plain python starts a script. `afterwards` are signals for ranks, sent once all the
others have ended. `settings` are constants to change in the ranks, by their full names.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 10.0


def run_rank(rank, request, port_pipe):
    os.chdir(request["directory"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    num_ranks, port = request["ranks"], os.read(port_pipe, 16).decode()
    if num_ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_RUN_ID": "forked",
        }
    os.environ |= request.get("environment", {})
    import ddpcall.watch.compare.exchange as exchange
    from ddpcall.cli import main

    exchange.WAIT_S = request.get("wait_s", exchange.WAIT_S)
    for name, value in request.get("settings", {}).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.argv = ["ddpcall", *request["arguments"]]
    main()


def in_child(work, *arguments):
    """Fork, do the work and leave as the interpreter does but for its clean-up; return the child's id."""
    child = os.fork()
    if child:
        return child
    leave = os._exit
    status = 0
    try:
        work(*arguments)
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    return leave(status)


def run_agent(request, answer):
    """Start the ranks, host their store, end them all when one fails; write their exit codes."""
    pipes = [os.pipe() for _ in range(request["ranks"])]
    children = [in_child(run_rank, rank, request, pipes[rank][0]) for rank in range(request["ranks"])]
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _, port_pipe in pipes:
        os.write(port_pipe, str(store.port).encode())
    afterwards = {children[rank]: number for rank, number in request.get("afterwards", ())}
    running = set(children)
    signal.signal(signal.SIGTERM, lambda *_: end_ranks(running, signal.SIGTERM))
    while running:
        child, status = os.wait()
        running.discard(child)
        note_end(answer, children.index(child), status)
        if status:
            end_ranks(running, signal.SIGTERM)
            signal.signal(signal.SIGALRM, lambda *_: end_ranks(running, signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, request.get("grace_s", GRACE_S))
        if running and running <= afterwards.keys():
            for other in running:
                os.kill(other, afterwards[other])


def end_ranks(running, number):
    for rank in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, number)


def note_end(answer, rank, status):
    os.write(answer, json.dumps([rank, os.waitstatus_to_exitcode(status)]).encode() + b"\n")


def launch(request):
    begun = time.monotonic()
    codes = Path(request["directory"]) / "codes"
    answer = os.open(codes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    agent = in_child(run_agent, request, answer)
    orphans = []
    while True:
        try:
            child, status = os.wait()  # the agent, and whoever is left when it was killed
        except ChildProcessError:
            break
        if child != agent:
            orphans.append(os.waitstatus_to_exitcode(status))
    ended = dict(json.loads(line) for line in codes.read_text().splitlines())
    told = [ended[rank] for rank in sorted(ended)]
    return {"codes": told + sorted(orphans), "seconds": time.monotonic() - begun}


def main():
    import torch._dynamo
    import torch.distributed
    import torch.multiprocessing.spawn  # noqa: F401

    if sys.argv[1:] == ["lab"]:
        import sklearn.datasets  # noqa: F401

        import ddpcall.lab.experiment
        import ddpcall.lab.train  # noqa: F401

    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(launch(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
