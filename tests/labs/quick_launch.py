"""Starts graded ranks by forking a process that has imported torch already: seconds less a run than torchrun.

What runs in a rank is the same, `ddpcall.teach.grade.rank`, in the environment that torchrun makes. The real
launch is tested beside it. `python -m tests.labs.quick_launch SOCKET` is the process that is
forked; with arguments, the command that takes torchrun's place.
"""

import atexit
import json
import os
import signal
import socket
import sys
import traceback


def serve(path: str) -> None:
    """Fork an agent for every request, until the pipe on stdin closes."""
    import torch._dynamo
    import torch.utils.data.distributed  # noqa: F401
    from torch.distributed.elastic.multiprocessing import errors  # noqa: F401

    import ddpcall.teach.grade.rank  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # agents are not waited for
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    if os.fork() == 0:  # leaves when the tests do
        sys.stdin.buffer.read()
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            run_agent(connection)
        connection.close()


def run_agent(connection: socket.socket) -> None:
    """Fork the ranks of one launch, host their store, and answer with the worst exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 1)
    order = json.loads(request)
    ranks = {}
    for rank in range(order["ranks"]):
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(send)
            run_rank(order, rank, descriptors[0], receive)
        os.close(receive)
        ranks[pid] = send
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for send in ranks.values():
        os.write(send, str(store.port).encode())
        os.close(send)
    worst = 0
    while ranks:
        pid, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        ranks.pop(pid)
        if code and not worst:  # as torchrun: the first that fails ends the others
            worst = code
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    connection.sendall(str(abs(worst)).encode())
    os._exit(0)


def run_rank(order: dict, rank: int, output: int, port: int) -> None:
    """Become a rank as torchrun would start it."""
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(order["directory"])
        size = str(order["ranks"])
        launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(port, 16).decode()}
        os.environ.clear()
        os.environ.update({**order["environment"], **launch, **store, "TORCHELASTIC_USE_AGENT_STORE": "True"})
        sys.argv = ["rank.py", order["script"]]
        from ddpcall.teach.grade.rank import main

        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


def ask(path: str, ranks: str, script: str) -> int:
    """Have a script run with this process's environment, directory and output; return its exit code."""
    order = {"ranks": int(ranks), "script": script, "directory": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(order).encode()], [1])
        return int(connection.recv(16) or b"1")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    sys.exit(ask(*sys.argv[1:]))
