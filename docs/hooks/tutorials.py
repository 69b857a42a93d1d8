"""A hook of MkDocs: each script in `docs/tutorials` is a notebook, executed for its page.

The scripts are in Jupytext's percent format. A page is added for each, with the notebook to
download; an error in a cell ends the build, and what a cell writes to stderr is a warning, which
`mkdocs build --strict` takes for an error. Notebooks are kept in `build/tutorials` until their
script or the library changes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path

import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: The first figure of each tutorial; the gallery shows it.
figures: dict[str, str] = {}
log = logging.getLogger("mkdocs.hooks.tutorials")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page, the notebook and the figures of each script."""
    for script in sorted(Path(config.docs_dir, "tutorials").glob("*.py")):
        notebook = _executed(script)
        exporter = MarkdownExporter()
        text, resources = exporter.from_notebook_node(
            notebook, {"output_files_dir": f"{script.stem}_files"}
        )
        drawn = re.search(rf"{script.stem}_files/\w+\.png", text)
        if drawn:
            figures[script.stem] = drawn.group()
        title, _, rest = text.lstrip().partition("\n")
        note = f"*A notebook: [download it, executed]({script.stem}.ipynb).*"
        made = {
            f"{script.stem}.md": f"{title}\n\n{note}\n{rest}",
            f"{script.stem}.ipynb": nbformat.writes(notebook),
            **resources["outputs"],
        }
        for name, content in made.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a script leads to its page: such a link works in a checkout as well."""

    def heading(found: re.Match[str]) -> str:
        title, stem = found.groups()
        if stem not in figures:
            return found.group()
        figure = f"![Figure of the tutorial: {title}](tutorials/{figures[stem]})"
        return f"{found.group()}\n\n[{figure}](tutorials/{stem}.py)"

    if page.file.src_uri == "gallery.md":
        markdown = re.sub(r"^## \[(.+)\]\(tutorials/(\w+)\.py\)$", heading, markdown, flags=re.M)
    return re.sub(r"\]\(((?:\.\./)?tutorials/)?([a-z_]+)\.py\)", r"](\1\2.md)", markdown)


def _executed(script: Path) -> nbformat.NotebookNode:
    sources = [script, HERE / "matplotlibrc", *sorted((ROOT / "pjax").rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    kept = ROOT / "build" / "tutorials" / f"{script.stem}-{digest[:16]}.ipynb"
    if kept.is_file():
        return nbformat.read(kept, as_version=4)
    log.info("Executing %s", script.relative_to(ROOT))
    notebook = jupytext.read(script)
    os.environ["MATPLOTLIBRC"] = str(HERE / "matplotlibrc")
    with tempfile.TemporaryDirectory() as folder:
        runner = ExecutePreprocessor(timeout=600, kernel_name="python3")
        runner.preprocess(notebook, {"metadata": {"path": folder}})
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                log.warning("%s wrote to stderr: %s", script.name, output["text"])
    kept.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, kept)
    return notebook
