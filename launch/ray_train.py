"""A script on the workers of Ray Train: python launch/ray_train.py --workers 2 launch/train.py experiment=arming

With --watch the watch stands in front of the script. Every worker starts one process, as torchrun would, and tells
it its rank by the same variables; Ray chooses the machines.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import secrets
import signal
import subprocess
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


def train_loop(config: dict[str, Any]) -> None:
    """Run one rank of the script, on a worker of Ray's.

    Raises:
        RuntimeError: The rank's process failed; Ray then ends the others.
    """
    import ray.train  # pyright: ignore[reportMissingImports]
    import torch.distributed as dist

    context = ray.train.get_context()
    rank = context.get_world_rank()
    # The worker hosts the store, as torchrun's agent does, so that it outlives the ranks.
    store = None
    if rank == 0:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False)
    shared = [store.port if store is not None else 0, f"ray-{secrets.token_hex(8)}"]
    dist.broadcast_object_list(shared, src=0)
    port, launch = shared
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "GROUP_RANK": str(context.get_node_rank()),
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": launch,
        "DDPCALL_LAUNCH": launch,
    }
    command = [sys.executable, *config["command"]]
    done = subprocess.run(
        command, cwd=config["directory"], env=environment, preexec_fn=_end_with_parent, check=False
    )
    dist.barrier()  # rank 0 keeps the store until all have ended
    if done.returncode != 0:
        raise RuntimeError(f"rank {rank} ended with exit code {done.returncode}")


def _end_with_parent() -> None:
    """Let Linux end this process when its worker is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Start the workers and wait for them; exits with 1 where a rank failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="how many ranks")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each")
    parser.add_argument("--watch", action="store_true", help="put the watch in front of the script")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    options = parser.parse_args()
    try:
        from ray.train import ScalingConfig  # pyright: ignore[reportMissingImports]
        from ray.train.torch import TorchTrainer  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("launch/ray_train.py needs Ray Train. Write: pip install 'ray[train]'", file=sys.stderr)
        sys.exit(2)
    command = [options.script, *options.arguments]
    if options.watch:
        command = ["-m", "ddpcall", "watch", *command]
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"command": command, "directory": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpu),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray has shown what the ranks said
        print(f"launch/ray_train.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
