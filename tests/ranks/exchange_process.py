"""One rank of a world without a launcher: publishes vitals, and does to itself what the test says.

Usage: exchange_process.py PORT RANK WORLD_SIZE WAIT_S ACTION. All ranks print "ready". Rank 0 then reads a
line before each step and prints a line of JSON for each comparison; the other ranks follow it.
"""

import json
import os
import signal
import sys
import time

from torch.distributed import TCPStore

from ddpcall.watch.compare.exchange import Exchange
from ddpcall.watch.compare.vitals import PARTS, Vitals

LAST_STEP = 10_000


def compare(exchange: Exchange) -> None:
    """Take one step for every line that comes in, and compare it."""
    for step, _ in enumerate(sys.stdin, 1):
        exchange.publish(Vitals(step, dict.fromkeys(PARTS, 1)))
        began = time.monotonic()
        comparison = exchange.compare(step, wait=True)
        seconds = time.monotonic() - began
        missing = None if comparison is None else comparison.missing
        print(json.dumps([step, missing, seconds, exchange.failure]), flush=True)


def act(exchange: Exchange, action: str) -> None:
    """Follow rank 0 step by step; after step 2 do what was told."""
    for step in range(1, LAST_STEP):
        exchange.publish(Vitals(step, dict.fromkeys(PARTS, 1)))
        while not exchange.failure and exchange._inbox.state.done.get("replicas", -1) < step:
            with exchange._changed:
                exchange._await(lambda step=step: exchange._inbox.state.done.get("replicas", -1) >= step, 1)
        if step == 2 and action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif step == 2 and action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if exchange.failure or (step == 2 and action == "leave"):
            return


def main() -> None:
    """Run the rank."""
    port, rank, world_size = map(int, sys.argv[1:4])
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    exchange = Exchange(store, rank, world_size, wait_s=float(sys.argv[4]))
    print("ready", flush=True)
    if rank == 0:
        compare(exchange)
    else:
        act(exchange, sys.argv[5])
    exchange.close()


if __name__ == "__main__":
    main()
