"""Process groups of trials, on real ranks."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ddpcall.lab.world import Accelerator, World, open_world, process_group


class SlowToConnect(World):
    """A rank that comes late to say that it is connected, and sees then whether rank 0 has gone."""

    def publish(self, key: str, value: Any) -> None:
        """Publish, late."""
        if key == "trial/connected":
            until = time.monotonic() + 1
            while time.monotonic() < until and not self.has("left", 0):
                time.sleep(0.01)
            value = self.has("left", 0)
        super().publish(key, value)


@pytest.mark.ranks(2)
def test_no_rank_leaves_a_group_before_all_are_connected():
    """A trial that crashed at once on rank 0 closed connections that rank 1 was still making."""
    dist.destroy_process_group()
    world = open_world()
    if world.rank == 1:
        world = SlowToConnect(**vars(world))
    with process_group(world, Accelerator(torch.device("cpu"), "gloo"), "trial", 60):
        pass
    world.publish("left", True)
    assert world.read("trial/connected", 1) is False
