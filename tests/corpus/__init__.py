"""Scripts that the watch is judged by, written by us after public reports, and the score.

`wrong/` holds mistakes, each with its source, the harm as measured and the line to be named; `right/` holds
correct programs that look like mistakes. `marks.py` says how a script states what must be found in it,
`score.py` runs the watch on all of them (`make corpus`), `harm.py` measures without ddpcall what a script
does to its replicas.

The scripts collect garbage before they destroy the process group: a DDP object is part of reference cycles,
and one that outlives its group makes torch abort or hang at exit now and then (pytorch/pytorch#56297).
"""
