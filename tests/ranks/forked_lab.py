"""The lab on forked ranks, with a model that misbehaves: 1 s a launch."""

import json

BOUND_S = 60  # of a launch, on a busy machine; most take 1 to 5 s
PATIENCE = {
    "ddpcall.lab.guard.FAREWELL_SECONDS": 2.0,
    "ddpcall.lab.guarded_run.GATHER_SECONDS": 10.0,
    "ddpcall.lab.experiment.GATHER_SECONDS": 10.0,
}


class LabRun:
    """A finished run of the lab in the directory `run`, of a model that misbehaves."""

    def __init__(
        self, launcher, directory, *overrides, ranks=2, fault="", point="none", victim=1, settings=(), **more
    ):
        request = {
            "arguments": [
                "train", "steps=8", "tensorboard=false", "report=false", "hydra.run.dir=run", "device=cpu",
                "model._target_=tests.ranks.faulty_model.Faulty", *overrides,
            ],
            "directory": str(directory),
            "ranks": ranks,
            "grace_s": 5.0,
            "settings": PATIENCE | dict(settings),
            "environment": {"FAULT": fault, "POINT": point, "VICTIM": str(victim), **more},
        }  # fmt: skip
        answer = launcher.launch(request, BOUND_S)
        self.out, self.err = (directory / "out").read_text(), (directory / "err").read_text()
        assert answer is not None, f"no end within {BOUND_S} s: {self.err}"
        self.codes = answer["codes"]
        self.directory = directory / "run"
        # c10d's own words about a broken connection are not ours.
        self.said = [line for line in self.err.splitlines() if line.startswith("ddpcall: ")]

    def summary(self):
        return json.loads((self.directory / "summary.json").read_text())

    def how_it_ended(self):
        summary = self.summary()
        return summary["outcome"], summary["first_failing_rank"]
