"""`torchrun launch/train.py experiment=forward_bypass`: hands the command line to the lab, and nothing else."""

from ddpcall.lab.train import main

if __name__ == "__main__":
    main()
