"""The Hydra configuration tree; also travels in the wheel as the package `ddpcall.conf`."""
