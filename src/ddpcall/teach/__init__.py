"""The course: lessons that predict, run and explain, and graded exercises. Stands on `lab` and `watch`."""
