"""Every Python block of the documents runs as it stands, and links between files lead somewhere.

Tutorials are executed by the build of the documentation (`make docs`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
FILE = re.compile(r"`([\w/]+\.py)`")


def blocks(document: Path) -> list[str]:
    return BLOCK.findall(document.read_text())


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=path.name) for path in DOCUMENTS if blocks(path)],
)
def test_python_blocks_run_one_after_the_other(document: Path) -> None:
    names: dict[str, object] = {"__name__": "document"}
    text = document.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        code = compile("\n" * line + block.group(1), str(document), "exec", dont_inherit=True)
        exec(code, names)


def test_the_documents_show_python() -> None:
    assert sum(len(blocks(path)) for path in DOCUMENTS) >= 8


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for path in [*DOCUMENTS, *sorted((ROOT / "docs" / "tutorials").glob("*.py"))]
    ],
)
def test_links_lead_to_files(document: Path) -> None:
    for target in LINK.findall(document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_files_that_are_named_exist() -> None:
    rooms = ("pjax", "tests", "benchmarks", "docs", "examples", ".ci")
    files = [f"/{path.relative_to(ROOT)}" for room in rooms for path in (ROOT / room).rglob("*.py")]
    texts = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
    for document in [*texts, *(ROOT / "pjax").rglob("*.py")]:
        for name in FILE.findall(document.read_text()):
            assert any(path.endswith(f"/{name}") for path in files), (document.name, name)
