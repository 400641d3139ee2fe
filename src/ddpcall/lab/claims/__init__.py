"""What people write about `forward`, put on trial: every claim is a small experiment that anyone can run and read.

A claim module holds, for each claim: a frozen record of what is measured, an experiment that returns it, and a judge,
a pure function from the record to a verdict and one sentence. Experiments stand on their own, so that a learner can
copy one and change it: this is the one place outside `paths` and `wrappers` that spells `.forward(` and imports DDP.
"""
