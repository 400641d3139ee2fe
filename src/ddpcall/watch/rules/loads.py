"""DC307: a state dict none of whose names match, but for a wrapper's prefix, is loaded with `strict=False`."""

from __future__ import annotations

from ddpcall.taps import Undo
from ddpcall.watch.rules.rule import Rule
from ddpcall.watch.run import Run
from ddpcall.watch.sensors.loads import LoadSensor, MissedLoad
from ddpcall.watch.sensors.steps import Step


class LoadRule(Rule):
    """Tells of a load that loaded nothing, at the next step or the end: until then it may be made good."""

    part = "what load_state_dict does not find"

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.sensor = LoadSensor(run)

    def attach(self) -> Undo:
        """Attach its sensor; returns the undo."""
        return self.sensor.attach()

    def before_step(self, step: Step) -> None:
        """Report what was not made good."""
        self._report(step.number)

    def close(self, in_order: bool) -> None:
        """Report what was not made good, where nothing was trained since."""
        if in_order:
            self._report(max(1, self._run.steps.preparing() - 1))

    def _report(self, step: int) -> None:
        missed, self.sensor.missed = self.sensor.missed, []
        for each in missed:
            if each.is_as_it_was():
                message = (
                    f"None of the {each.num_given} tensors that were to be loaded here matches a name of the "
                    f"model, and `strict=False` keeps quiet about it: it has `{each.own}`, and the state "
                    f"`{each.given}`. Without the wrapper's prefix {each.num_meant} of them match."
                )
                self.report("DC307", "prefix", each.site, message, step=step, fix=_advise(each))


def _advise(missed: MissedLoad) -> str:
    shorter, longer = sorted((missed.given, missed.own), key=len)
    prefix = longer.removesuffix(shorter)
    if prefix not in ("module.", "_orig_mod."):
        return ""
    if missed.given.startswith(prefix):
        return (
            f'`torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "{prefix}")` before the '
            "load, and no `strict=False`."
        )
    return (
        f"Load into the module inside the wrapper, `model.{prefix}load_state_dict(state)`, without `strict=False`."
    )


RULES = (LoadRule,)
