"""Where a function on ranks finds itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rank:
    """The rank a test body runs on.

    Attributes:
        rank: this process's rank in the default process group.
        world_size: number of ranks.
        device: where this rank's model belongs, `cpu` on gloo and `cuda:<rank>` on NCCL.
    """

    rank: int
    world_size: int
    device: torch.device

    def barrier(self) -> None:
        """Wait until every rank is here."""
        import torch.distributed as dist

        dist.barrier(device_ids=None if self.device.type == "cpu" else [self.rank])


def current_rank() -> Rank:
    """Describe this process's place in the default process group."""
    import torch.distributed as dist

    from ddpcall.accelerator import choose_device

    rank = dist.get_rank()
    return Rank(rank, dist.get_world_size(), choose_device(dist.get_backend(), rank))
