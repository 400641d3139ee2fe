"""Processes that a launch left behind."""

import os
import time
from pathlib import Path


def processes_in(directory) -> list[str]:
    """Return the command lines of processes whose working directory this is."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if os.readlink(f"{entry.path}/cwd") == str(directory):
                    found.append(Path(entry.path, "cmdline").read_text())
            except OSError:
                continue
    return found


def wait_until_gone(directory, seconds: float = 60) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := processes_in(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
