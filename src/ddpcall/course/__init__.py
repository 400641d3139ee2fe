"""The course: lessons that predict, run and explain, and exercises that are graded. Stands on `lab` and `watch`."""
