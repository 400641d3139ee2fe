"""Lessons, claims and exercises: predict, run, compare. One kind of question, one kind of result."""
