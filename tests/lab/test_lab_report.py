"""`pjax report`: what the page holds, what it makes of names and files, and its figures."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import TINY, prepare, recorded

from pjax.lab import cli, commands, comparison, config, inspection, report, runs, summaries
from pjax.lab.config import CompareConfig, TrainConfig
from pjax.lab.data import batch_rows, load
from pjax.lab.files import write_json
from pjax.lab.train import Record
from tests.selection import mostly_slow

#: Without hidden layers it compiles sooner.
PROJECTED = dataclasses.replace(
    TINY,
    method="displacement-adam",
    hidden=(),
    seeds=(0,),
    steps=3,
    measure_every=1,
    schedule="constant",
)
#: Elements that HTML does not close.
VOID = ("meta", "br", "link", "img", "hr", "input")


class Page(HTMLParser):
    """The elements of a page, each with its attributes and its own text; it checks the nesting."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        if tag == "thead":
            self.tables[self._caption] = []
        if tag == "tr":
            self.tables[self._caption].append([])
        if tag in ("th", "td"):
            self.tables[self._caption][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self.words.append(data)
        if "caption" in self._open:
            self._caption += data
        elif "th" in self._open or "td" in self._open:
            self.tables[self._caption][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def table(self, start: str) -> list[list[str]]:
        """The rows of the only table whose caption starts so, with the headings first."""
        (found,) = (rows for caption, rows in self.tables.items() if caption.startswith(start))
        return found

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def compared(folder: Path, name: str, aucs: tuple[float | None, ...] = (None, None)) -> Path:
    """The folder of a comparison whose cells nobody trained."""
    settings = CompareConfig(hidden=(6,), batch_size=256, steps=4, methods=("sgd",), seeds=(0, 1))
    path = comparison.open_folder(settings, load("digits"), folder, name)
    rates = [
        [rate, decay, 0.9 - abs(rate - 0.3) - decay / 100]
        for rate in (0.1, 0.3, 1)
        for decay in (0, 4)
    ]
    write_json(path / "cells" / "sgd.tuning.json", {"method": "sgd", "candidates": rates})
    for seed in settings.seeds:
        records = tuple(Record(n, n / 10, 0.5 + 0.1 * n + seed / 50, math.nan) for n in range(5))
        cell = comparison.Cell(
            method="sgd",
            description="rate 0.3, constant",
            seed=seed,
            together=2,
            best_step=4,
            steps=4,
            stopped="",
            validation_accuracy=records[-1].validation_accuracy,
            test_accuracy=0.8 + seed / 60,
            test_auc=aucs[seed],
            seconds=0.4,
            compile_seconds=1.0,
            state_bytes=5000,
            records=records,
        )
        write_json(comparison._cell_path(path, "sgd", seed), comparison._plain(cell))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on displacements, one of sgd that was stopped, and a comparison."""
    root = tmp_path_factory.mktemp("runs")
    path, *rest = prepare(PROJECTED, root)
    path = path.rename(root / "projected")
    runs.advance(path, *rest)
    recorded(root, "stopped", dataclasses.replace(TINY, method="sgd", rate=0.5), finished=False)
    compared(root, "compared")
    return root


@pytest.fixture(scope="module")
def looks() -> list[inspection.Inspection]:
    """The inspections that `page` made."""
    return []


@pytest.fixture(scope="module")
def page(folder: Path, looks: list[inspection.Inspection]) -> Page:
    """The page about all three, one batch solved."""
    output = folder / "deep" / "report.html"
    names = ("projected", "stopped", "compared")
    arguments = ["report", *(str(folder / name) for name in names), "--output", str(output)]
    inspect = inspection.inspect

    def kept(*given: Any) -> inspection.Inspection | None:
        found = inspect(*given)
        if found is not None:
            looks.append(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "inspect", kept)
        assert cli.main(arguments) == 0
    return Page(output.read_text("utf-8"))


def written(folders: list[Path], output: Path, draw: bool = True) -> Page:
    """The page without solving, and without figures unless `draw`: those take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(report, "_curves", lambda *given: [])
        report.write(folders, output, solve=False)
    return Page(output.read_text("utf-8"))


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a folder, to damage it."""
    return lambda name: shutil.copytree(folder / name, tmp_path / name)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_results_are_those_of_the_runs_with_their_errors(page: Page, folder: Path) -> None:
    headings, *rows = page.table("Accuracies: means")
    assert headings[:2] == ["method", "test"]
    cells = [dict(zip(headings, row, strict=True)) for row in rows]
    found = {row["run"]: row for row in cells}
    assert list(found) == ["projected", "stopped", "compared: SGD"]
    assert found["compared: SGD"]["method"] == "SGD"
    (seed,) = result(folder / "projected")["seeds"]
    assert found["projected"]["test"] == f"{100 * seed['test_accuracy']:.2f} %"
    tests, validations = np.array([0.8, 0.8 + 1 / 60]), np.array([0.9, 0.92])
    for name, values in (("test", tests), ("validation", validations)):
        error = values.std(ddof=1) / 2**0.5
        assert found["compared: SGD"][name] == f"{100 * values.mean():.2f} ± {100 * error:.2f} %"
    assert found["compared: SGD"]["settings"] == "rate 0.3, constant"
    # Seconds are of the two seeds that trained side by side.
    assert found["compared: SGD"]["training"] == "0.20 s"
    assert found["compared: SGD"]["state"] == "5 kB"
    assert found["stopped"]["test"] == "not measured"
    assert found["stopped"]["batches"] == "5"


def test_an_unfinished_run_says_how_to_go_on(page: Page, folder: Path) -> None:
    assert "Not finished: measured up to batch 5 of 10." in page.text
    assert f"pjax train --resume {shlex.quote(str(folder / 'stopped'))}" in page.text
    assert page.text.count("Not finished:") == 1


def test_settings_environment_and_data_are_all_there(page: Page, folder: Path) -> None:
    differing = {row[0]: row[1:] for row in page.table("Settings in which")}
    assert differing["method"] == ["displacement-adam", "sgd", ""]
    assert differing["rate"] == ["", "0.5", ""]
    assert "batch_size" not in differing
    environment = json.loads((folder / "stopped" / "environment.json").read_text())
    assert environment["python"] in page.text
    assert json.loads((folder / "projected" / "data.json").read_text())["sha256"] in page.text
    # Tables of one caption follow each other; the comparison's is the last.
    shown = {row[0]: row[1] for row in page.table("Settings.")[1:]}
    assert shown["methods"] == "sgd"
    assert shown["seeds"] == "0 1"
    # The search for a rate, with the one that was chosen.
    rows = page.table("sgd: tuned")[1:]
    tried = json.loads((folder / "compared" / "cells" / "sgd.tuning.json").read_text())
    assert len(rows) == len(tried["candidates"])
    assert [row[:2] for row in rows if "chosen" in row[2]] == [["0.3", "constant"]]


@pytest.mark.parametrize(
    "settings",
    [
        TrainConfig(),
        PROJECTED,
        TrainConfig(hidden=(), skip=True, seeds=(3,), tensorboard=True, measure_every=2),
        TrainConfig(method="sgd", rate=1e-5, schedule="constant", data_dir=Path("a b/$c")),
        CompareConfig(),
        CompareConfig(methods=("adam",), seeds=(5, 6), model="cnn", channels=(4,), tuning_seed=9),
    ],
)
def test_a_command_gives_the_settings_again(settings, monkeypatch) -> None:
    name = "train" if isinstance(settings, TrainConfig) else "compare"
    seen = []
    monkeypatch.setattr(commands, name, lambda options, console: seen.append(options) or 0)
    program, *arguments = shlex.split(config.to_command(settings, name))
    assert program == "pjax"
    assert cli.main(arguments) == 0
    assert commands._plain(seen[0], type(settings)) == settings


def test_commands_of_the_page_repeat_and_go_on(page: Page, folder: Path) -> None:
    assert config.to_command(PROJECTED, "train") in page.text
    found = summaries.summarise(folder / "compared")
    assert found.command in page.text
    assert found.go_on.startswith(found.command)
    assert found.go_on.endswith(f"--name compared --runs-dir {folder}")


def test_the_page_is_accessible_and_needs_no_network(page: Page) -> None:
    assert page.source.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert any(one.get("name") == "viewport" for one in page.all("meta"))
    assert page.all("main")
    ids = [one["id"] for _, one in page.elements if one.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "img")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png")), value
            assert value is None or value.startswith("data:") or value[1:] in ids
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert not re.search(r"url\((?!#)", page.source)
    assert not re.search(r"@import|https?:", page.source)
    figures = page.all("svg")
    assert len(figures) == len(page.all("figure")) == len(page.all("figcaption")) == 7
    for one in figures:
        assert one["role"] == "img"
        assert len(one["aria-label"] or "") > 40
    assert len(page.source) < 500_000


def test_one_batch_of_a_run_is_drawn(page: Page, folder: Path) -> None:
    alternatives = [one["aria-label"] or "" for one in page.all("svg")]
    (residual,) = (text for text in alternatives if text.startswith("Residual of each node"))
    assert "cross_entropy" in residual
    (graph,) = (text for text in alternatives if text.startswith("Graph of"))
    assert "Graph of 3 nodes" in graph
    # Texts in figures are text: they can be searched for.
    for word in ("2 cross_entropy", "output.weight", "batches of 256"):
        assert word in page.text


def test_an_inspection_is_what_the_method_does(page: Page, looks, folder: Path) -> None:
    (found,) = looks
    run = runs.trained(folder / "projected")
    assert (found.seed, found.step) == (0, run.best_step[0])
    dataset = load("digits")
    rows = next(batch_rows(len(dataset.train), 256, 0))
    x, y = jnp.asarray(dataset.train.x[rows]), np.asarray(dataset.train.y[rows])
    for name, value in run.of_seed().items():
        np.testing.assert_array_equal(found.params[name], value)

    def loss(params: Any) -> Any:
        chances = jax.nn.log_softmax(run.model.apply(params, x))
        return -jnp.mean(chances[jnp.arange(256), y])

    gradient = jax.grad(loss)(run.of_seed())
    for name, value in gradient.items():
        np.testing.assert_allclose(found.gradient[name], value, atol=1e-5)
        # A displacement of stiff activations is close to the gradient.
        moved = found.displacement[name].ravel()
        cosine = moved @ value.ravel() / jnp.linalg.norm(moved) / jnp.linalg.norm(value)
        assert cosine > 0.9
    assert found.profile is not None
    assert found.profile.names[0] == "2 cross_entropy"
    assert bool(jnp.all(jnp.isfinite(found.profile.residual)))
    assert {node.colour for node in found.graph.nodes} == {"A", "B"}
    assert found.sizes.bytes > 0
    assert inspection.inspect(folder / "stopped") is None


@pytest.mark.slow
def test_a_large_solve_is_left_out(copied, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(inspection, "LARGEST_STATE", 10)
    report.write([copied("projected")], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "Residuals by node are left out" in page.text
    assert "Displacement by layer" in page.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "splitting", "steps"),
    [("projection", "layer", 1), ("cp", "layer", 3), ("ap", "neuron", 3), ("dr", "neuron", 3)],
)
def test_the_displacement_of_a_projection_is_what_a_step_moves(
    method, splitting, steps, tmp_path: Path
) -> None:
    settings = dataclasses.replace(
        PROJECTED, hidden=(6,), method=method, splitting=splitting, projection_steps=3
    )
    path, *rest = prepare(settings, tmp_path)
    runs.advance(path, *rest)
    found = inspection.inspect(path)
    assert found is not None
    assert found.profile is not None
    assert found.profile.residual.shape == (steps, len(found.profile.names))
    run, dataset = runs.trained(path), load("digits")
    rows = next(batch_rows(len(dataset.train), 256, 0))
    x, y = jnp.asarray(dataset.train.x[rows]), jnp.asarray(dataset.train.y[rows])
    trained, params = config.make_method(settings, 10), run.of_seed()
    state = trained.init(run.model, params, x, y)
    moved, _, _ = trained.step(run.model, params, state, x, y)
    for name, value in params.items():
        scale = float(jnp.max(jnp.abs(found.displacement[name])))
        assert scale > 0
        wanted = value - moved[name]
        np.testing.assert_allclose(found.displacement[name], wanted, atol=1e-3 * scale)


def test_other_data_leave_a_note(copied, tmp_path: Path) -> None:
    run = copied("projected")
    content = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**content, "sha256": "0"}))
    report.write([run], tmp_path / "other.html")
    page = Page((tmp_path / "other.html").read_text("utf-8"))
    assert "could not be solved anew" in page.text
    assert "trained on other data" in page.text
    assert "Displacement by layer" not in page.text


def test_names_and_files_are_text_never_markup(copied, tmp_path: Path) -> None:
    run = copied("stopped")
    name = "_<script>alert('x')<!--$x_1$ & \x01\udcff"
    run = run.rename(tmp_path / name)
    evil = "</style></svg><script>alert(1)</script>"
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(
        json.dumps({**environment, evil: {"a": evil}, "b": [evil, None, 1e400, "\ud800"]})
    )
    page = written([run, copied("compared")], tmp_path / "report.html")
    assert not page.all("script")
    assert "_<script>alert('x')<!--$x_1$ & \ufffd\ufffd" in page.text
    assert page.text.count(evil) == 3
    # The figure's legend has the name too.
    assert "$x_1$" in page.source[page.source.index("<svg") :].split("</svg>")[0]


def test_two_folders_of_one_name_go_by_their_paths(copied, folder: Path, tmp_path: Path) -> None:
    other = copied("stopped")
    page = written([folder / "stopped", other, other], tmp_path / "report.html", draw=False)
    headings, *rows = page.table("Accuracies: means")
    assert [row[headings.index("run")] for row in rows] == [str(folder / "stopped"), str(other)]


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("projected", "metrics.jsonl", b"{}\n", "line 1 is damaged"),
        ("projected", "metrics.jsonl", None, "metrics.jsonl: cannot be read"),
        ("projected", "environment.json", b"[1]", "environment.json: damaged"),
        ("projected", "data.json", b"\xff", "data.json: damaged"),
        ("projected", "result.json", b'{"step": 1}', "Test accuracies are left out."),
        ("stopped", "metrics.jsonl", b"", "measured up to batch 0"),
        ("compared", "cells/sgd.seed0.json", b"{", "sgd.seed0.json: damaged"),
        ("compared", "cells/sgd.seed1.json", None, "not trained: sgd with seed 1"),
        ("compared", "cells/sgd.tuning.json", b'{"candidates": 3}', "not the search for a rate"),
    ],
)
def test_what_cannot_be_used_is_told_on_the_page(
    name, file, content, words, copied, folder: Path, tmp_path: Path
) -> None:
    damaged = copied(name)
    if content is None:
        (damaged / file).unlink()
    else:
        (damaged / file).write_bytes(content)
    page = written([damaged, folder / "projected"], tmp_path / "report.html", file[0] == "m")
    assert words in page.text
    # The other run is all there.
    accuracy = result(folder / "projected")["seeds"][0]["test_accuracy"]
    assert f"{accuracy:.2%}" in page.text


@pytest.mark.parametrize(
    ("name", "before", "after", "words"),
    [
        ("projected", "", "", "not the folder of pjax train or pjax compare"),
        ("projected", "steps = 3\n", "steps = 0\n", "steps must be from 1"),
        ("compared", "steps = 4\n", "steps = [\n", "not valid TOML"),
        ("compared", "seed = 1000\n", "seed = true\n", "tuning_seed must be an integer"),
    ],
)
def test_what_is_no_run_is_one_message(
    name, before, after, words, copied, tmp_path: Path, capsys
) -> None:
    damaged = copied(name)
    settings = (damaged / "config.toml").read_text()
    (damaged / "config.toml").unlink()
    if before:
        assert before in settings
        (damaged / "config.toml").write_text(settings.replace(before, after))
    capsys.readouterr()
    for arguments in ([str(damaged)], [str(tmp_path / "nowhere")], []):
        output = tmp_path / "report.html"
        assert cli.main(["report", *arguments, "--output", str(output)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert (words if arguments == [str(damaged)] else "folder") in error
        assert not output.exists()


JUNK = (None, True, -1, 1e400, 10**400, float("nan"), "", "x", [], [[1]], {}, {"a": None}, 2**63)


FILES = (
    ("projected", "result.json"),
    ("projected", "data.json"),
    ("projected", "environment.json"),
    ("projected", "metrics.jsonl"),
    ("compared", "cells/sgd.seed0.json"),
    ("compared", "cells/sgd.tuning.json"),
)


@pytest.mark.parametrize(("name", "file"), mostly_slow(FILES, quick=FILES[3:4]))
def test_no_value_in_a_file_ends_a_report(name, file, copied, tmp_path: Path) -> None:
    """Every field in turn holds what it must not; the page is written."""
    damaged = copied(name)
    random = np.random.default_rng(0)
    original = (damaged / file).read_text()
    lines = original.splitlines(keepends=True) if file.endswith("jsonl") else [original]
    content = json.loads(lines[-1])
    for count, path in enumerate(_paths(content)):
        value = JUNK[random.integers(len(JUNK))]
        changed = json.dumps(_with(content, path, value))
        (damaged / file).write_text("".join([*lines[:-1], changed, "\n"]))
        written([damaged], tmp_path / "report.html", draw=count % 20 == 0)


def _paths(content: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    entries = content.items() if isinstance(content, dict) else enumerate(content[:3])
    found = []
    for key, value in entries:
        found.append((*before, key))
        if isinstance(value, (dict, list)) and len(before) < 3:
            found += _paths(value, (*before, key))
    return found


def _with(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_of_texts_have_contrast() -> None:
    style = (Path(report.__file__).parent / "report.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        for text in ("ink", "quiet", "accent"):
            for ground in ("paper", "panel"):
                assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
        assert contrast(scheme["warn-ink"], scheme["warn-paper"]) >= 4.5
    assert math.isclose(contrast("#ffffff", "#000000"), 21)


def test_the_auc_is_shown_where_it_is_known(tmp_path: Path, folder: Path) -> None:
    path = compared(tmp_path, "two classes", (0.75, 0.85))
    report.write([path], tmp_path / "page.html", solve=False)
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    headings, row = page.table("Accuracies")
    assert row[headings.index("test AUC")] == "0.8000 ± 0.0500"
    headings, *rows = page.table("Each seed")
    assert [row[headings.index("test AUC")] for row in rows] == ["0.7500", "0.8500"]
    report.write([folder / "compared"], tmp_path / "page.html", solve=False)
    assert "AUC" not in (tmp_path / "page.html").read_text("utf-8")
