"""What turns facts and comparisons into findings."""
