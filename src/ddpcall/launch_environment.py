"""What a launcher's environment variables say about this process: read here, and nowhere else. No torch.

torchrun's variables come first, then srun's and mpirun's. `os.environ` is read at each call, because a program may
set variables of its own before it starts ranks.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """What a launcher's variables say about this process.

    Attributes:
        rank: Its rank in the whole run.
        num_ranks: How many there are.
        local_rank: Its rank on this host.
        num_local: How many there are on this host.
        variables: All that tell this rank from another, and from one of another launch; empty without a launcher.
    """

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    num_local: int = 1
    variables: dict[str, str] = field(default_factory=dict)


# Per launcher: rank, number of ranks, local rank, number of local ranks. srun's numbers are those of the step: one
# process of a batch script has SLURM_PROCID and SLURM_NTASKS too.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LAUNCHERS = (
    _TORCHRUN,
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
)
_SAYS_RANK = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")


def read_place() -> Place:
    """Read this process's place from whichever launcher started it; rank 0 of 1 without one."""
    names = [name for launcher in _LAUNCHERS for name in launcher]
    told = {name: os.environ[name] for name in (*names, "SLURM_STEP_ID", "MASTER_PORT") if name in os.environ}
    variables = told if any(name in told for name in _SAYS_RANK) else {}
    for rank, num_ranks, local_rank, num_local in _LAUNCHERS:
        if rank in told and num_ranks in told:
            return Place(
                _number(rank, 0), _number(num_ranks, 1), _number(local_rank, 0), _number(num_local, 1), variables
            )
    return Place(variables=variables)


def read_torch_place() -> Place | None:
    """Read the variables that torch's `env://` reads; None where RANK is not set.

    A launcher that sets no local rank is taken to have started all ranks on one host.

    Raises:
        ValueError: A variable is missing or no number; the message names it.
    """
    if "RANK" not in os.environ:
        return None
    rank, num_ranks = _require_number("RANK"), _require_number("WORLD_SIZE")
    local_rank = _require_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    num_local = _require_number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else num_ranks
    return Place(rank, num_ranks, local_rank, num_local)


def read_attempt() -> int:
    """Return how often torchrun has restarted the ranks. Its store outlives them: keys need this number."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def read_max_restarts() -> int:
    """Return how often torchrun may restart the ranks."""
    return _number("TORCHELASTIC_MAX_RESTARTS", 0)


def read_address() -> tuple[str, str]:
    """Return host and port of the ranks' store, as they are written; empty where they are not set."""
    return os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")


def has_agent_store() -> bool:
    """Say whether torchrun's agent holds the store at `read_address`, so that it outlives every rank."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def read_job() -> str:
    """Return the id that torchrun gives to all ranks of a run; empty without one."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def read_given_name() -> str:
    """Return the launch's name where the launcher gives one; needed where each rank has another parent (Ray)."""
    return os.environ.get("DDPCALL_LAUNCH", "")


def is_started_alone() -> bool:
    """Say whether `accelerate launch` prepared for several processes and started one, as it does with `--cpu`.

    Source: `prepare_simple_launcher_cmd_env` in accelerate/utils/launch.py sets the address for more than one.
    """
    is_accelerates = any(name.startswith("ACCELERATE_") for name in os.environ)
    return is_accelerates and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def is_of_a_launch(name: str) -> bool:
    """Say whether torchrun sets a variable of this name: what is started anew must not inherit it."""
    is_named = name in (*_TORCHRUN, "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    return is_named or name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_"))


def variables_of_rank(rank: int, num_ranks: int, store_port: int) -> dict[str, str]:
    """Return the variables torchrun would set, so that `init_process_group("env://")` and accelerate work.

    `TORCHELASTIC_USE_AGENT_STORE` makes torch join the store at this port instead of starting one of its own.

    Source: torch/distributed/rendezvous.py, `_create_c10d_store`.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store_port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _number(name: str, default: int) -> int:
    """Return the number a variable begins with: srun writes `2(x3)` for three hosts of two."""
    match = re.match(r"\d+", os.environ.get(name, ""))
    return default if match is None else int(match[0])


def _require_number(name: str) -> int:
    text = os.environ.get(name)
    if text is None:
        raise ValueError(f"{name} is not set")
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is no number")
    return int(text)
