"""What following the passes over a data loader costs: CPU time a batch, without and with the watch.

`python -m bench.loaders [--batches N]` draws batches of 4, 64 and 512 indices; the best of ten passes.
"""

import argparse
import time

from torch.utils.data import DataLoader, DistributedSampler

import ddpcall


def time_batch_us(batch_size: int, num_batches: int) -> float:
    """Return the microseconds a batch of one pass, over a dataset that costs next to nothing."""
    dataset = range(batch_size * num_batches)
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)  # pyright: ignore
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=len)  # pyright: ignore
    begun = time.process_time()
    num = sum(1 for _ in loader)
    return (time.process_time() - begun) / num * 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=400)
    num_batches = parser.parse_args().batches
    for batch_size in (4, 64, 512):
        plain, watched = [], []
        for _ in range(10):
            plain.append(time_batch_us(batch_size, num_batches))
            with ddpcall.watch(on_finding="record"):
                watched.append(time_batch_us(batch_size, num_batches))
        added = min(watched) - min(plain)
        print(
            f"{batch_size:4d} indices a batch: {min(plain):.1f} us, watched {min(watched):.1f} us: +{added:.1f} us"
        )


if __name__ == "__main__":
    main()
