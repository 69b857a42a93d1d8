"""The wheel, installed on its own: what it holds, what it needs, and what it says without `lab`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import pjax

ROOT = Path(__file__).resolve().parent.parent

IMPORT_ALL = """
import importlib, pathlib, sys
import pjax
root = pathlib.Path(pjax.__file__).parent
assert "site-packages" in str(root), root
names = sorted(
    ".".join(("pjax", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    for path in root.rglob("*.py")
)
core = [name for name in names if not name.startswith("pjax.lab")]
for name in core:
    importlib.import_module(name)
print(len(core), len(names))
try:
    importlib.import_module("pjax.lab")
except ImportError as error:
    assert 'pip install ".[lab]"' in str(error), error
else:
    sys.exit("pjax.lab was imported without its packages")
"""


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts' folder of a virtual environment that holds the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", with_pip=True)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = (scripts / "python", "-m", "pip", "--disable-pip-version-check", "--quiet")
    reachable = run(*pip, "download", "--no-deps", "--dest", folder / "probe", "jaxtyping")
    if reachable.returncode:
        pytest.skip("no package index is reachable, so that the wheel cannot be installed")
    installed = run(*pip, "install", wheel)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return scripts


def test_wheel_holds_the_package_and_its_marker_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pjax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packaged = {name for name in names if ".dist-info/" not in name}
    assert packaged == sources
    assert "pjax/py.typed" in packaged
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_core_imports_alone_and_lab_names_its_extra(environment: Path, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    imported = run(environment / "python", "-c", IMPORT_ALL, cwd=tmp_path, env=clean)
    assert imported.returncode == 0, imported.stdout + imported.stderr
    core, everything = map(int, imported.stdout.split())
    assert 10 < core < everything

    trained = run(environment / "python", ROOT / ".ci" / "smoke", cwd=tmp_path, env=clean)
    assert trained.returncode == 0, trained.stdout + trained.stderr

    command = run(environment / "pjax", "demo", cwd=tmp_path, env=clean)
    assert command.returncode == 1
    assert 'pip install ".[lab]"' in command.stderr
    assert "Traceback" not in command.stderr


def test_lab_requires_what_its_extra_installs() -> None:
    from pjax import lab

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {"scikit-learn": "sklearn", "orbax-checkpoint": "orbax", "tomli-w": "tomli_w"}
    names = [one.split(">=")[0] for one in project["optional-dependencies"]["lab"]]
    extra = {modules.get(name, name) for name in names}
    assert extra == set(lab.REQUIREMENTS)


def test_versions_agree_wherever_they_are_written() -> None:
    """pyproject, the package, the citation, and the newest section of the changelog."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    sections = re.findall(
        r"^## \[([^\]]+)\](?: - \d{4}-\d{2}-\d{2})?$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert sections[0] == "Unreleased"
    assert project["version"] == pjax.__version__ == citation["version"] == sections[1]
    assert citation["license"] == project["license"]
    # What Citation File Format 1.2 requires of a file and of each reference.
    for entry, fields in (
        (citation, {"cff-version", "message", "title", "authors"}),
        (citation["references"][0], {"type", "title", "authors"}),
    ):
        assert fields <= entry.keys()
    assert citation["references"][0]["url"] == project["urls"]["Paper"]


def test_workflows_name_what_is_there() -> None:
    """Steps run targets of the Makefile and files of `.ci`; what a job needs is a job."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = {
        one.rsplit(" ", 1)[1] for one in project["classifiers"] if one.startswith("Programming")
    } - {"3"}
    workflows = {path.name: path for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(workflows) == {"tests.yml", "build.yml", "release.yml"}
    for path in workflows.values():
        jobs = yaml.safe_load(path.read_text())["jobs"]
        for name, job in jobs.items():
            needs = job.get("needs", [])
            assert set([needs] if isinstance(needs, str) else needs) <= jobs.keys(), name
            if "uses" in job:
                assert (ROOT / job["uses"]).is_file(), job["uses"]
            for step in job.get("steps", []):
                command = step.get("run", "")
                assert set(re.findall(r"\bmake (\w+)", command)) <= targets
                for used in re.findall(r"\.ci/\w+", command):
                    assert (ROOT / used).is_file(), used
    matrix = yaml.safe_load(workflows["tests.yml"].read_text())["jobs"]["tests"]["strategy"]
    assert set(matrix["matrix"]["python"]) == pythons
    publish = yaml.safe_load(workflows["release.yml"].read_text())["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"] == "pypi"
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys(), path


def test_the_oldest_requirements_are_those_of_pyproject() -> None:
    printed = run(sys.executable, ROOT / ".ci" / "oldest").stdout.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [one.replace(">=", "==") for one in project["dependencies"]]
    assert sorted(printed) == sorted(
        [*wanted, *(one.replace("jax==", "jaxlib==") for one in wanted if one.startswith("jax=="))]
    )


def test_old_names_of_modules_warn_and_completion_shows_no_machinery() -> None:
    with pytest.warns(DeprecationWarning, match=r"`pjax\.displacements` is `pjax\.training"):
        from pjax.displacements import value_and_displacement  # pyright: ignore
    assert value_and_displacement is pjax.value_and_displacement
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pjax.nothing  # pyright: ignore  # noqa: B018
    shown = {name for name in dir(pjax) if not name.startswith("__")}
    assert shown.isdisjoint({"backend", "graph", "program", "training", "annotations"})
    assert {"optim", "solvers", "metrics", "explain"} <= shown
