"""The loop inside a rank: receive a task, join its process group, run it, reply, put everything back."""

import contextlib
import ctypes
import datetime
import faulthandler
import functools
import gc
import io
import os
import pickle
import runpy
import signal
import sys
import time
import traceback
import types
from collections.abc import Generator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ddpcall.launch_environment import variables_of_rank

STACKS_SIGNAL = signal.SIGUSR2
_PR_SET_PDEATHSIG = 1
_CONNECTING = datetime.timedelta(seconds=5)


@dataclass(frozen=True)
class WorkerSlot:
    """A worker's place in its pool: its rank and the files that its output and its stacks go to."""

    rank: int
    directory: Path

    @property
    def stdout(self) -> Path:
        """The file that the worker's standard output goes to."""
        return self.directory / f"rank{self.rank}.out"

    @property
    def stderr(self) -> Path:
        """The file that the worker's standard error goes to."""
        return self.directory / f"rank{self.rank}.err"

    @property
    def stacks(self) -> Path:
        """The file that the worker's Python stacks are dumped into."""
        return self.directory / f"rank{self.rank}.stacks"


@dataclass(frozen=True)
class Task:
    """One call for every rank, with the surroundings of the process that asks for it."""

    number: int
    world_size: int
    backend: str
    payload: bytes  # pickle of (function, args, kwargs)
    store_port: int
    group_timeout_s: float
    main: tuple[str, str] | None  # how to import the caller's __main__: ("name", …) or ("path", …)
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    directory: str = field(default_factory=os.getcwd)
    sys_path: list[str] = field(default_factory=lambda: list(sys.path))
    argv: list[str] = field(default_factory=lambda: list(sys.argv))


@dataclass
class Reply:
    """What a worker sends back. `value` is a pickle, so that a value the parent cannot load hurts nobody."""

    value: bytes | None = None
    error: str = ""
    details: str = ""
    leaks: list[str] = field(default_factory=list)
    ended_s: float = 0.0


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process as soon as its parent is gone, however it went.

    Blind to: systems without prctl (macOS); there a worker ends when it next waits for a task.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)  # the parent went before the call above


def serve(connection_fd: int) -> None:
    """Run tasks until the parent closes the connection. Does not return."""
    connection = Connection(connection_fd)
    slot: WorkerSlot = connection.recv()
    _take_slot(slot)
    from ddpcall.ranks import isolation  # imports torch: after the slot, so that its warnings are captured

    baseline = isolation.RankState()
    gc.collect()
    gc.freeze()  # what is there now is never garbage: collections after each task stay cheap
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(_run(task, slot, baseline))


def _take_slot(slot: WorkerSlot) -> None:
    for path, descriptor in ((slot.stdout, 1), (slot.stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        raw = open(descriptor, "wb", buffering=0, closefd=False)  # noqa: SIM115
        # Unbuffered all the way: a killed rank must not take its last words along.
        text = io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", write_through=True)
        setattr(sys, stream, text)
        setattr(sys, f"__{stream}__", text)


def _run(task: Task, slot: WorkerSlot, baseline: Any) -> Reply:
    """Run one task from a clean state to a clean state."""
    from ddpcall.ranks import isolation

    for path in (slot.stdout, slot.stderr):
        os.truncate(path, 0)
    with slot.stacks.open("w") as stacks:
        faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True, chain=False)
        faulthandler.enable(sys.stderr)
        _enter(task, slot)
        isolation.seed_everything()
        reply = _attempt(task, slot)
        _leave_group(task)
        baseline.restore()
        reply.leaks = isolation.find_leaks()
        sys.stdout.flush()
        sys.stderr.flush()
        faulthandler.unregister(STACKS_SIGNAL)
        signal.signal(STACKS_SIGNAL, signal.SIG_IGN)  # a late request for stacks must not kill a healthy worker
    return reply


def _enter(task: Task, slot: WorkerSlot) -> None:
    """Take over the caller's environment, directory, import path and arguments."""
    environ = task.environ | variables_of_rank(slot.rank, task.world_size, task.store_port)
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    os.chdir(task.directory)
    sys.path[:] = task.sys_path
    sys.argv[:] = task.argv


def _attempt(task: Task, slot: WorkerSlot) -> Reply:
    """Run the function; nothing of it, not even its frames, is alive when this returns."""
    reply = Reply()
    try:
        if task.main is not None:
            _adopt_main(*task.main)
        function, args, kwargs = pickle.loads(task.payload)
        _join_group(task, slot)
        value = function(*args, **kwargs)
        reply.ended_s = time.monotonic()
        reply.value = _pickle_value(value)
    except BaseException as error:  # SystemExit and KeyboardInterrupt too: a rank that leaves early has failed
        reply.ended_s = time.monotonic()
        reply.error = "".join(traceback.format_exception_only(error)).strip()
        reply.details = _format_traceback(error)
    return reply


def _pickle_value(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"the function returned something that cannot be pickled ({type(value).__name__}): {error}. "
            "Return numbers, strings, tensors or plain containers of them."
        ) from None


def _format_traceback(error: BaseException) -> str:
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))


def _join_group(task: Task, slot: WorkerSlot) -> None:
    import torch.distributed as dist

    from ddpcall import accelerator

    accelerator.select_device(accelerator.choose_device(task.backend, slot.rank))
    store = dist.PrefixStore(f"task{task.number}", _connect_store(task.store_port))
    with _reuse_gloo_device(os.environ.get("GLOO_SOCKET_IFNAME", "")):
        dist.init_process_group(
            backend=task.backend,
            store=store,
            rank=slot.rank,
            world_size=task.world_size,
            timeout=datetime.timedelta(seconds=task.group_timeout_s),
        )

    if store.add("joined", 1) == task.world_size:
        store.set("all_joined", "")
    # A rank that were done at once would close connections that a slower one is still making.
    store.wait(["all_joined"])


@contextlib.contextmanager
def _reuse_gloo_device(interface: str) -> Generator[None]:
    """Have the default group use this worker's one gloo device, so that leaving the group takes no time.

    A device owns the thread that polls the sockets; ending it takes up to 10 ms each time, twice per group. The
    connections themselves are new for every group either way. torch offers no argument for this. Where a torch
    hands its constructor something that the options do not know, the group gets a device of its own.

    Source: gloo/transport/tcp/loop.cc (`epoll_wait` with 10 ms); torch distributed_c10d.py,
    `_new_process_group_helper`.
    """
    from torch.distributed import distributed_c10d

    gloo = getattr(distributed_c10d, "ProcessGroupGloo", None)
    if gloo is None or not interface or "," in interface:
        yield
        return

    class ProcessGroupGloo(gloo):
        def __init__(self, store: Any, rank: int, size: int, *others: Any, **settings: Any) -> None:
            options = None if others else _gloo_options(interface, settings)
            if options is None:
                super().__init__(store, rank, size, *others, **settings)
            else:
                super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = gloo  # pyright: ignore[reportAttributeAccessIssue]


def _gloo_options(interface: str, settings: dict[str, Any]) -> Any:
    """Return options with this worker's device and the constructor's settings; None where torch has others."""
    from ddpcall import torch_internals as internals

    make = internals.GLOO_OPTIONS.get(None)
    options = None if make is None else make()
    values = {internals.GLOO_TIMEOUT.name if name == "timeout" else name: settings[name] for name in settings}
    if options is None or not all(hasattr(options, name) for name in (internals.GLOO_DEVICES.name, *values)):
        return None
    setattr(options, internals.GLOO_DEVICES.name, [_create_gloo_device(interface)])
    for name, value in values.items():
        setattr(options, name, value)
    return options


@functools.cache
def _create_gloo_device(interface: str) -> Any:
    from torch.distributed import ProcessGroupGloo

    return ProcessGroupGloo.create_device(interface=interface)


@functools.cache
def _connect_store(port: int) -> Any:
    """Connect to the parent's store once: every connection makes torch look up the name of 127.0.0.1.

    Where the name server answers slowly that lookup takes seconds.
    """
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)


def _leave_group(task: Task) -> None:
    """Free what the task left, then its process groups.

    The order matters: a DistributedDataParallel that outlives `destroy_process_group` can deadlock when it is
    freed (pytorch issue 56297).
    """
    import torch.distributed as dist

    sys.last_value = sys.last_traceback = None
    gc.collect()
    if dist.is_initialized():
        from ddpcall import torch_internals as internals

        world = internals.WORLD.get(None)
        if world is None or len(world.pg_map) > 1:
            _let_others_connect(task)
        dist.destroy_process_group()


def _let_others_connect(task: Task) -> None:
    """Wait, for a while, until all ranks are through.

    A slower one may still be connecting a group that the task made, and would find the connection closed.
    """
    import torch.distributed as dist

    store = dist.PrefixStore(f"task{task.number}", _connect_store(task.store_port))
    if store.add("through", 1) == task.world_size:
        store.set("all_through", "")
    with contextlib.suppress(dist.DistStoreError):
        store.wait(["all_through"], _CONNECTING)


def _adopt_main(how: str, target: str) -> None:
    """Make the caller's script importable as `__main__`, without running its main block.

    Source: multiprocessing/spawn.py, `_fixup_main_from_path`.
    """
    if hasattr(sys.modules["__main__"], "__ddpcall_adopted__"):
        return
    run = runpy.run_module if how == "name" else runpy.run_path
    module = types.ModuleType("__mp_main__")
    module.__dict__["__ddpcall_adopted__"] = target
    module.__dict__.update(run(target, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
