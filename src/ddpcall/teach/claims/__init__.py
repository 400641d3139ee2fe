"""What people write about `forward`, put on trial: every claim is a small experiment to run and to read.

For each claim there is a frozen record of what is measured, an experiment that returns one, and a judge: a pure
function from the record to a verdict and one sentence. Experiments stand on their own, so that a learner can copy
one and change it. That is why this room, like `paths` and `wrappers`, may spell `.forward(` and import DDP.
"""
