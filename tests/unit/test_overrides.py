"""Keys that nothing reads are refused with what was meant; what Hydra and the user's own code read is not."""

import importlib.metadata
import re

import pytest

from ddpcall.lab.errors import WrongUse
from ddpcall.lab.overrides import check_composed, check_overrides
from tests.conf.test_conf import compose_typed


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("stepz=3", "Did you mean steps=3?"),
        ("+stepz=3", "Did you mean steps=3?"),
        ("++stepz=3,4", "Did you mean steps=3,4?"),
        ("lr=0.1", "Did you mean optimizer.lr=0.1?"),
        ("+probes.mode=true", "Did you mean probes.modes=true?"),
        ("+data.batch.size=3", None),
        ("+probes={mixin: true}", "Did you mean probes.mixing?"),
        ("+nothing_like_it=1", "nothing would read it. `--cfg job` prints all keys."),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_what_was_meant(written, meant):
    if meant is None:
        return check_overrides([written])  # any key may stand beside a `_target_`
    with pytest.raises(WrongUse, match=re.escape(meant)):
        check_overrides(["steps=3", written])
    return None


@pytest.mark.parametrize(
    "written",
    [
        *("steps=1,2", "grid.path=[call]", "~optimizer.momentum", "hydra.run.dir=x", "hydra/launcher=basic"),
        *("wrapper=ddp", "+model.width=3", "+wrapper.ddp.static_graph=true", "wrapper.ddp={static_graph: true}"),
        *("loss._target_=x.y", "+experiment=mine", "expect=[{gradients: local}]", "--config-dir=x", "steps"),
        *("=", "a=[b", "grid.wrapper=range(1,3)"),
    ],
)
def test_what_is_read_and_what_hydra_parses_itself_is_left_alone(written):
    check_overrides([written])


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm"])
def test_a_launcher_that_is_a_plugin_says_what_to_install(launcher, monkeypatch):
    def find_nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", find_nothing)
    package = launcher.split("_")[0]
    with pytest.raises(WrongUse, match=f"Write: pip install hydra-{package}-launcher"):
        check_overrides([f"hydra/launcher={launcher}"])


def test_arguments_without_a_target_are_refused_once_all_is_composed(tmp_path):
    with pytest.raises(
        WrongUse, match=r"there is no key data\.root, .* stand beside data\._target_=my\.module\.name"
    ):
        check_composed(compose_typed("+data.root=/x"))
    with pytest.raises(WrongUse, match=r"Did you mean optimizer\.lr=0\.2\?"):
        check_composed(compose_typed("optimizer.lrr=0.2"))
    check_composed(compose_typed("+data.root=/x", "data._target_=my.module.load"))
    # A file of one's own has the target, the command line its argument.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("_target_: my.module.load\nroot: /x\n")
    config = compose_typed("data=mine", "data.root=/y", f"hydra.searchpath=[file://{tmp_path}]")
    check_composed(config)
    assert vars(config.data)["root"] == "/y"
