"""The wheel carries everything: built, installed into an empty environment, run from another directory."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import ddpcall
from tests.ranks.lab_process import ROOT, TIMEOUT_S, clean_environment


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = clean_environment()
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", directory, ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = directory.glob("*.whl")
    return path


def install(wheel: Path, directory: Path) -> Path:
    """Install the wheel alone into an empty environment; return its bin directory."""
    venv.create(directory, with_pip=False)
    installed = run(
        sys.executable, "-m", "pip", "--python", directory / "bin" / "python", "install", "--no-deps", wheel
    )
    assert installed.returncode == 0, installed.stderr
    return directory / "bin"


def lend_dependencies(environment: Path) -> None:
    """Let the environment see this one's packages; not its editable ddpcall, as nested .pth files are not read."""
    (site,) = environment.glob("lib/python*/site-packages")
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")


def test_the_wheel_holds_every_configuration_file_and_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"ddpcall/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "ddpcall").rglob("*.py")}
    templates = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("templates/*")}
    assert len(templates) > 4
    assert conf | modules | templates | {"ddpcall/py.typed"} <= names


def test_the_version_is_written_once_and_is_the_changelogs_newest(wheel):
    assert wheel.name.startswith(f"ddpcall-{ddpcall.__version__}-")
    for name in ("pyproject.toml", "CITATION.cff"):
        assert not re.search(r"^version\s*[=:]\s*[\"\d]", (ROOT / name).read_text(), re.MULTILINE), name
    released = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == ddpcall.__version__


def test_ddpcall_train_works_from_the_wheel_without_a_checkout(wheel, tmp_path):
    bin_directory = install(wheel, tmp_path / "environment")
    lend_dependencies(tmp_path / "environment")
    where = run(bin_directory / "python", "-c", "import ddpcall.conf; print(ddpcall.conf.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(tmp_path)), where.stderr
    options = ("experiment=forward_bypass", "steps=3", "tensorboard=false")
    done = run(bin_directory / "ddpcall", "train", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 of 7 cells have expectations, and all hold" in done.stdout


def test_without_the_lab_extra_the_command_says_what_to_install(wheel, tmp_path):
    bin_directory = install(wheel, tmp_path / "environment")
    done = run(bin_directory / "ddpcall", "train", cwd=tmp_path)
    assert done.returncode == 2
    assert "torch is not installed" in done.stderr
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    metadata = packages / "torch-2.13.0.dist-info" / "METADATA"  # the version is read there, without an import
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    done = run(bin_directory / "ddpcall", "train", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'ddpcall[lab]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert run(bin_directory / "ddpcall", "--version").stdout.startswith("ddpcall 0.")
