"""Watch this process if a watched one started it as a rank of a distributed run; otherwise do nothing.

`ddpcall watch` puts this directory in front of its children's PYTHONPATH. Every Python below a watched process
runs this file, whatever its version and packages, so it is short, silent and imports nothing before it must.
"""

import os
import sys


def _is_training():
    """Say whether this may be a rank: it runs a script or module, and a launcher has told it which rank it is.

    Or it is a process of `multiprocessing`, in which a function may say so.
    """
    if _is_of_multiprocessing():
        return True
    if not hasattr(sys, "orig_argv") or not getattr(sys, "argv", None) or sys.argv[0] in ("", "-", "-c"):
        return False
    if os.path.join("torch", "_inductor") in sys.argv[0]:
        return False  # a compile worker
    return any(name in os.environ for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))


def _is_of_multiprocessing():
    command = getattr(sys, "orig_argv", [])
    return "--multiprocessing-fork" in command or any("multiprocessing.forkserver" in part for part in command)


def _watch():
    try:
        if _is_of_multiprocessing():
            from ddpcall.watch.sensors.group_hook import begin_with_group as begin
        else:
            from ddpcall.watch.program.children import begin
    except ImportError:  # an environment without ddpcall
        return
    begin()


def _run_next():
    """Run the sitecustomize that this one stands in front of."""
    mine = sys.modules.pop("sitecustomize")
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    try:
        import sitecustomize  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", mine)


try:
    if "DDPCALL_WATCH" in os.environ and _is_training():
        _watch()
finally:
    _run_next()
