"""The lab: Hydra-configured experiments that run a grid of trials and compare verdicts with expectations."""
