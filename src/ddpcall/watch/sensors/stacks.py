"""What a script uses that the watch does not follow, and how large its process group is."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from ddpcall import torch_internals as internals
from ddpcall.taps import Undo, hear_calls
from ddpcall.watch.output.watched import DATA_PARALLEL, FSDP1

# Module, what is called there when somebody uses it, and its name in the answer.
STACKS = (
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel.__init__", FSDP1),
    ("torch.nn.parallel.data_parallel", "DataParallel.__init__", DATA_PARALLEL),
    ("deepspeed.runtime.engine", "DeepSpeedEngine.__init__", "DeepSpeed's engine"),
    ("horovod.torch", "DistributedOptimizer", "Horovod's DistributedOptimizer"),
    ("apex.parallel.distributed", "DistributedDataParallel.__init__", "apex's DistributedDataParallel"),
    ("fairscale.nn.data_parallel.sharded_ddp", "ShardedDataParallel.__init__", "fairscale's ShardedDataParallel"),
    (
        "fairscale.nn.data_parallel.fully_sharded_data_parallel",
        "FullyShardedDataParallel.__init__",
        "fairscale's FullyShardedDataParallel",
    ),
    (
        "megatron.core.distributed.distributed_data_parallel",
        "DistributedDataParallel.__init__",
        "Megatron's DistributedDataParallel",
    ),
    ("colossalai.booster.booster", "Booster.boost", "ColossalAI's Booster"),
    ("torch_xla.core.xla_model", "optimizer_step", "torch_xla's optimizer_step"),
)


class StackWatch:
    """Notes stacks that are used and not followed, when an instance is made or the function is called.

    Attributes:
        not_followed: Their names, each once.
        group_size: Ranks of the largest default process group so far; 0 where there was none.

    Blind to: stacks that are not in `STACKS`; a class that a library made its own copy of.
    """

    def __init__(self) -> None:
        self.not_followed: dict[str, None] = {}
        self.group_size = 0

    def note(self, stack: str) -> None:
        """Note a stack that was used."""
        self.not_followed[stack] = None

    def attach(self, module: ModuleType, path: str, stack: str) -> Undo:
        """Hear of a use of one stack.

        Args:
            module: Where it is.
            path: The function's name in the module, or a method's behind its class.
            stack: What is noted.
        """
        owner_name, _, name = path.rpartition(".")
        owner = getattr(module, owner_name) if owner_name else module
        return hear_calls(owner, name, before=lambda *_, **__: self.note(stack))

    def attach_groups(self, made: Callable[[], None]) -> Undo:
        """Hear of default process groups; returns the undo.

        Args:
            made: Is called where there is one.

        Source: `init_process_group` in torch/distributed/distributed_c10d.py ends with it.
        """
        c10d = internals.UPDATE_DEFAULT_PG.owner()

        def updated(_: None, group: Any) -> None:
            if hasattr(group, "size"):
                self.group_size = max(self.group_size, group.size())
                made()

        if c10d.is_initialized():
            self.group_size = c10d.get_world_size()
            made()
        return hear_calls(c10d, internals.UPDATE_DEFAULT_PG.name, after=updated)
