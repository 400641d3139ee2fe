"""The course: lessons that predict, run and explain, and exercises that grade themselves. Above `lab` and `watch`."""
