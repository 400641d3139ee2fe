"""The watch: catches in a training run it has never seen what the lab's experiments show."""
