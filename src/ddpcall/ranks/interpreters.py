"""Where worker processes come from: forked from a warm fork server (0.1 s) or started fresh (seconds).

The fork server is one extra process that imports torch and torch._dynamo once and then forks a worker whenever it
is asked to. It runs no thread and touches no CUDA, so forking it is safe. Ours rather than multiprocessing's fork
server, because that one is shared with the user's code and takes its settings.
"""

import contextlib
import importlib
import json
import multiprocessing.connection
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Protocol

from ddpcall.ranks.worker import die_with_parent, serve

PRELOADED = ("torch", "torch._dynamo", "torch.nn.parallel", "torch.distributed.fsdp")
_PARENT_CHECK_S = 1.0
_BOOTSTRAP = """\
import json, sys
module, function, arguments = json.loads(sys.argv[1])
sys.path[:] = json.loads(sys.argv[2])
import importlib
getattr(importlib.import_module(module), function)(*arguments)
"""


class Interpreters(Protocol):
    """A source of worker processes."""

    def start(self) -> tuple[int, Connection]:
        """Start a worker; return its process id and the connection to it."""
        """Start a worker; returns its process id and the connection to it."""
        ...

    def reap(self, pid: int) -> int:
        """Wait for a worker that ends; return its exit code."""
        """Wait for a worker that has ended; returns its exit status, negative for a signal."""
        ...

    def close(self) -> None:
        """End all workers at once."""
        """End what is not a worker."""
        ...


def _launch(function: str, arguments: list[Any], descriptor: int, log: Path) -> "subprocess.Popen[bytes]":
    call = json.dumps([__name__, function, arguments])
    flags: list[str] = subprocess._args_from_interpreter_flags()  # pyright: ignore[reportAttributeAccessIssue]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *flags, "-c", _BOOTSTRAP, call, json.dumps(sys.path)],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | worker_defaults(),
        )


def worker_defaults() -> dict[str, str]:
    """Environment for several ranks on one machine, where the user has not chosen otherwise.

    One thread per rank, as torchrun does; no compile workers that would outlive a task; gloo on the loopback
    interface, which needs no name lookup and no open firewall.
    """
    defaults = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if sys.platform.startswith("linux"):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in defaults.items() if name not in os.environ}


class ForkServer:
    """Workers forked from one process that has torch imported already."""

    def __init__(self, directory: Path) -> None:
        ours, theirs = socket.socketpair()
        self._log = directory / "fork_server.log"
        arguments = [theirs.fileno(), os.getpid(), str(directory), list(PRELOADED)]
        with theirs:
            self._process = _launch("run_fork_server", arguments, theirs.fileno(), self._log)
        self._control = Connection(ours.detach())

    def start(self) -> tuple[int, Connection]:
        """Start a worker; return its process id and the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._control.send(("fork", None))
                send_handle(self._control, theirs.fileno(), self._process.pid)
                pid = self._control.recv()
            except (EOFError, OSError) as error:
                ours.close()
                raise RuntimeError(f"no rank could be started:\n{self._log.read_text()}") from error
        return pid, Connection(ours.detach())

    def reap(self, pid: int) -> int:
        """Wait for a worker that ends; return its exit code."""
        try:
            self._control.send(("reap", pid))
            return self._control.recv()
        except (EOFError, OSError):
            return -signal.SIGKILL  # the fork server is gone, and its workers with it

    def close(self) -> None:
        """End all workers at once."""
        self._control.close()
        self._process.kill()
        self._process.wait()


def run_fork_server(control_fd: int, parent_pid: int, directory: str, modules: list[str]) -> None:
    """Fork workers on request until the parent is gone; then remove the pool's directory and end."""
    control = Connection(control_fd)
    for module in modules:
        importlib.import_module(module)
    while os.getppid() == parent_pid:
        if not multiprocessing.connection.wait([control], _PARENT_CHECK_S):
            continue
        try:
            request, pid = control.recv()
        except EOFError:
            break
        control.send(_fork_worker(control) if request == "fork" else _wait_for(pid))
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def _wait_for(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork_worker(control: Connection) -> int:
    connection_fd = recv_handle(control)
    server_pid = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 counts the idle threads of BLAS
        pid = os.fork()
    if pid == 0:
        control.close()
        run_worker(connection_fd, server_pid)
    os.close(connection_fd)
    return pid


class FreshInterpreters:
    """Workers that each start a new interpreter, so that they read every setting anew."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "workers.log"
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> tuple[int, Connection]:
        """Start a worker; return its process id and the connection to it."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = _launch("run_worker", [theirs.fileno(), os.getpid()], theirs.fileno(), self._log)
        self._processes[process.pid] = process
        return process.pid, Connection(ours.detach())

    def reap(self, pid: int) -> int:
        """Wait for a worker that ends; return its exit code."""
        return self._processes.pop(pid).wait()

    def close(self) -> None:
        """End all workers at once."""
        for process in self._processes.values():
            process.kill()
            process.wait()


def run_worker(connection_fd: int, parent_pid: int) -> None:
    """Become a worker: own process group (Ctrl-C is the parent's business), dies with its parent."""
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        die_with_parent(parent_pid)
        serve(connection_fd)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
