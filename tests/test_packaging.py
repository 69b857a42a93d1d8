"""The wheel, installed on its own: what it holds, what it needs, and what it says without `lab`."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

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
