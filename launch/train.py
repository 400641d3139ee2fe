"""`torchrun launch/train.py experiment=forward_bypass`: hands the command line to the lab, and nothing else."""

import sys

from ddpcall.cli import train

if __name__ == "__main__":
    train(sys.argv[1:])
