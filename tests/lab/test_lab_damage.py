"""Damaged configurations, checkpoints and other files of a run: one message, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from run_helpers import TINY, start

from pjax.lab import checkpoints, cli, config, runs
from pjax.lab.config import CompareConfig, TrainConfig
from pjax.lab.errors import RunError

Damage = Callable[[Path], object]


def refuses(arguments: list[str], capsys, *words: str) -> None:
    """The command ends with status 1 and one message of one screen that has these words."""
    capsys.readouterr()
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("pjax: ")
    assert "Traceback" not in error
    assert len(error) < 1000
    assert error.count("\n") <= 5
    for word in words:
        assert word in error, error


BAD_SETTINGS = {
    "empty": ("", "holds no settings"),
    "only a comment": ("# nothing\n", "holds no settings"),
    "no value": ("steps =\n", "not valid TOML"),
    "no quotes": ("method = adam\n", "not valid TOML"),
    "cut in a text": ('method = "ad', "not valid TOML"),
    "cut in a list": ("hidden = [8, ", "not valid TOML"),
    "a key twice": ("steps = 1\nsteps = 2\n", "not valid TOML"),
    "JSON": ('{"steps": 3}', "not valid TOML"),
    "zero bytes": ("steps = 3\0\n", "not valid TOML"),
    "a huge number": ("steps = " + "9" * 5000, "not valid TOML"),
    "nested": ("hidden = " + "[" * 40_000, "not"),
    "huge": ("# " + "x" * 200_000, "too large"),
    "unknown": ("stpes = 3\n", "did you mean steps?"),
    "unknown and unlike any": ("colour = 3\n", "there is no setting 'colour'"),
    "unknown and long": ("x" * 3000 + " = 3\n", "there is no setting"),
    "a table": ("[train]\nsteps = 3\n", "there is no setting 'train'"),
    "steps as a text": ('steps = "3"\n', "steps must be an integer, got '3'"),
    "steps as a fraction": ("steps = 3.5\n", "steps must be an integer"),
    "steps as a truth": ("steps = true\n", "steps must be an integer"),
    "steps as a list": ("steps = [3]\n", "steps must be an integer"),
    "steps as a date": ("steps = 2020-01-01\n", "steps must be an integer"),
    "no steps": ("steps = 0\n", "steps must be from 1"),
    "fewer than no steps": ("steps = -5\n", "steps must be from 1"),
    "too many steps": ("steps = 10000000000000000000000\n", "steps must be from 1"),
    "hidden as a number": ("hidden = 8\n", "hidden must be a list, each entry an integer"),
    "hidden of texts": ('hidden = ["8"]\n', "hidden must be a list, each entry an integer"),
    "hidden of lists": ("hidden = [[8]]\n", "hidden must be a list, each entry an integer"),
    "no width": ("hidden = [8, 0]\n", "hidden takes positive widths"),
    "a width of less": ("hidden = [-1]\n", "hidden takes positive widths"),
    "skip as a number": ("skip = 1\n", "skip must be true or false"),
    "skip as a text": ('skip = "yes"\n', "skip must be true or false"),
    "a method that is none": ('method = "newton"\n', "method must be one of projection, "),
    "a method as a number": ("method = 3\n", "method must be one of"),
    "an activation that is none": ('activation = "ReLU"\n', "activation must be one of relu"),
    "a model that is none": ('model = ""\n', "model must be one of mlp, cnn"),
    "a rate as a text": ('method = "sgd"\nrate = "fast"\n', "rate must be a number"),
    "no rate": ('method = "sgd"\nrate = 0\n', "rate must be positive"),
    "a rate below none": ('method = "sgd"\nrate = -0.1\n', "rate must be positive"),
    "a rate that is not finite": ('method = "sgd"\nrate = inf\n', "rate must be positive"),
    "a rate that is no number": ('method = "sgd"\nrate = nan\n', "rate must be positive"),
    "a rate for a projection": ('method = "projection"\nrate = 0.1\n', "has no learning rate"),
    "a rate for a solver": ('method = "cp"\nrate = 0.1\n', "has no learning rate"),
    "no seeds": ("seeds = []\n", "needs at least one seed"),
    "a seed twice": ("seeds = [1, 1]\n", "holds a seed twice"),
    "a seed below zero": ("seeds = [-1]\n", "takes seeds from 0"),
    "a seed too large": ("seeds = [4294967296]\n", "takes seeds from 0"),
    "no checkpoint kept": ("keep = 0\n", "keep must be from 1"),
    "a path as a number": ("data_dir = 3\n", "data_dir must be a path"),
    "a path of two lines": ('data_dir = "a\\nb"\n', "data_dir must be a path on one line"),
    "a data set as a list": ('dataset = ["digits"]\n', "dataset must be one of digits"),
    "a data set that is none": ('dataset = "letters"\n', "dataset must be one of digits"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_configuration_names_the_file_and_the_setting(
    case: str, tmp_path: Path, capsys
) -> None:
    content, message = BAD_SETTINGS[case]
    path = tmp_path / "settings.toml"
    path.write_text(content)
    refuses(["train", "--config", str(path)], capsys, str(path), message)
    with pytest.raises(RunError, match="settings.toml"):
        config.read(path, TrainConfig)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfes\0t\0", "byte 0 is not UTF-8"),
        (b"steps = 3 # \x80", "byte 12 is not UTF-8"),
        (np.zeros(500, np.float32).tobytes(), "not valid TOML"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_configuration_that_is_no_text(content, message, tmp_path: Path, capsys) -> None:
    path = tmp_path / "settings.toml"
    if content is not None:
        path.write_bytes(content)
    refuses(["train", "--config", str(path)], capsys, str(path), message)
    refuses(["compare", f"--config={path}"], capsys, str(path), message)


def test_a_folder_as_a_configuration(tmp_path: Path, capsys) -> None:
    refuses(["train", "--config", str(tmp_path)], capsys, str(tmp_path), "cannot be read")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('methods = ["cp", "newton"]\n', "methods must be a list, each entry one of projection"),
        ("methods = []\n", "needs at least one method"),
        ("methods = 3\n", "methods must be a list, each entry one of projection"),
        ('methods = ["cp", "cp"]\n', "holds a method twice"),
        ("seeds = [0, 1]\ntuning_seed = 1\n", "none of the seeds"),
        ('method = "cp"\n', "did you mean methods?"),
    ],
)
def test_a_bad_configuration_of_a_comparison(content, message, tmp_path: Path, capsys) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(content)
    refuses(["compare", "--config", str(path)], capsys, str(path), message)
    with pytest.raises(RunError, match="settings.toml"):
        config.read(path, CompareConfig)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be from 1"),
        (["--hidden", "8", "-2"], "--hidden takes positive widths"),
        (["--hidden", "1000000", "1000000"], "--hidden asks for 4e+03 GB of parameters"),
        (["--batch-size", "5000"], "--batch-size must be from 1 to 1077"),
        (["--seeds", "1", "1"], "--seeds holds a seed twice"),
        (["--method", "adam", "--rate", "nan"], "--rate must be positive"),
        (["--resume", "/nowhere/run"], "/nowhere/run: no such run"),
        (["--resume", "/nowhere/run", "--steps", "5"], "give no other option"),
        (["--name", "../x"], "--name must be the name of a folder"),
    ],
)
def test_wrong_options_name_the_option(options, message, tmp_path: Path, capsys) -> None:
    where = [] if "--resume" in options else ["--runs-dir", str(tmp_path)]
    refuses(["train", *options, *where], capsys, message)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run with checkpoints of the steps 6, 9 and 10."""
    path, *rest = start(tmp_path_factory.mktemp("runs"), method="sgd", rate=0.5)
    runs.advance(path, *rest)
    assert sorted(one.name for one in (path / "checkpoints").iterdir()) == [
        "00000006",
        "00000009",
        "00000010",
    ]
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def unfinish(run: Path) -> Path:
    """The run as if it had been killed after its last checkpoint."""
    (run / "result.json").unlink()
    return run


CHECKPOINT_FILES = (
    "manifest.json",
    "numbers.json",
    "arrays/_METADATA",
    "arrays/_CHECKPOINT_METADATA",
    "arrays/commit_success.txt",
    "arrays/manifest.ocdbt",
    "arrays/d/*",
    "arrays/ocdbt.process_0/manifest.ocdbt",
    "arrays/ocdbt.process_0/d/*",
)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" x")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", [empty, cut, flip, lengthen, remove])
def test_a_damaged_checkpoint_is_passed_over(name: str, damage: Damage, run: Path) -> None:
    newest = run / "checkpoints" / "00000010"
    file = sorted(newest.glob(name))[0]
    if damage is empty and not file.stat().st_size:
        damage = lengthen  # it is empty as it should be
    if damage is cut and file.stat().st_size < 2:
        damage = remove
    damage(file)
    told = []
    found = runs.trained(run, told.append)
    assert found.step == 9
    assert len(told) == 1
    # A manifest that reads well and is wrong cannot be told from a wrong file.
    assert str(newest if name == "manifest.json" else file) in told[0]
    assert "Using the one before." in told[0]
    before = checkpoints.load(run / "checkpoints" / "00000009")
    for key, value in found.params.items():
        np.testing.assert_array_equal(value, before.arrays[f"best.{key}"])


def rewrite_manifest(path: Path) -> None:
    """Makes the manifest fit the files again: damage that a checksum does not see."""
    files = {
        name: {"bytes": file.stat().st_size, "sha256": checkpoints._digest(file)}
        for name, file in checkpoints._files(path).items()
        if name != "manifest.json"
    }
    content = {"format": 1, "step": int(path.name), "files": files}
    (path / "manifest.json").write_text(json.dumps(content))


def edit(change: Callable[[dict], object]) -> Damage:
    """Changes the numbers of a checkpoint."""

    def damage(path: Path) -> None:
        content = json.loads((path / "numbers.json").read_text())
        change(content)
        (path / "numbers.json").write_text(json.dumps(content))
        rewrite_manifest(path)

    return damage


def replace_manifest(text: str) -> Damage:
    return lambda path: (path / "manifest.json").write_text(text)


def save_arrays(**arrays: np.ndarray) -> Damage:
    def damage(path: Path) -> None:
        found = checkpoints.load(path).arrays
        shutil.rmtree(path / "arrays")
        checkpoints._save_arrays(path / "arrays", {**found, **arrays})
        rewrite_manifest(path)

    return damage


def forget_array(path: Path) -> None:
    found = checkpoints.load(path).arrays
    del found["params.output.weight"]
    shutil.rmtree(path / "arrays")
    checkpoints._save_arrays(path / "arrays", found)
    rewrite_manifest(path)


UNFIT = {
    "a manifest of nothing": (replace_manifest("{}"), "not a manifest"),
    "a manifest that is a list": (replace_manifest("[1, 2]"), "an object expected"),
    "a manifest of deep lists": (replace_manifest("[" * 200_000), "nested too deeply"),
    "a manifest of another version": (
        replace_manifest('{"format": 99, "step": 10, "files": {}}'),
        "another version",
    ),
    "a manifest of another step": (
        replace_manifest('{"format": 1, "step": 11, "files": {}}'),
        "another folder",
    ),
    "a manifest without files": (
        replace_manifest('{"format": 1, "step": 10, "files": {}}'),
        "does not list numbers.json",
    ),
    "a manifest of wrong types": (
        replace_manifest('{"format": 1, "step": 10, "files": 3}'),
        "not a manifest",
    ),
    "a file too many": (
        lambda path: (path / "arrays" / "other").write_text("x"),
        "does not belong",
    ),
    "numbers without a training": (
        edit(lambda content: content.pop("training")),
        "not a checkpoint of a run",
    ),
    "numbers of another step": (
        edit(lambda content: content["training"].update(step=3)),
        "not a checkpoint of a run",
    ),
    "numbers without standings": (
        edit(lambda content: content["training"].update(standings=[])),
        "not a checkpoint of a run",
    ),
    "another width": (
        edit(lambda content: content["config"].update(hidden=[7])),
        "another configuration (hidden was [7] there",
    ),
    "another method": (
        edit(lambda content: content["config"].update(method="adam")),
        "another configuration (method was 'adam' there",
    ),
    "no arrays": (lambda path: shutil.rmtree(path / "arrays"), "missing"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_checkpoint_that_does_not_fit_is_passed_over(case: str, run: Path) -> None:
    damage, message = UNFIT[case]
    damage(run / "checkpoints" / "00000010")
    told = []
    assert runs.trained(run, told.append).step == 9
    assert len(told) == 1
    assert message in told[0]
    assert str(run / "checkpoints" / "00000010") in told[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (save_arrays(**{"best.output.weight": np.zeros((2, 3, 10), np.float32)}), "(2, 3, 10)"),
        (save_arrays(**{"params.relu.0.bias": np.zeros((6,), np.float32)}), "(6,)"),
        (save_arrays(**{"params.relu.0.bias": np.zeros((2, 6), np.int32)}), "int32"),
        (save_arrays(**{"params.more": np.zeros(3, np.float32)}), "holds params.more"),
        (forget_array, "params.output.weight is missing"),
    ],
)
def test_arrays_of_another_model_end_a_resume(damage, message, run: Path, capsys) -> None:
    damage(unfinish(run) / "checkpoints" / "00000010")
    refuses(["train", "--resume", str(run)], capsys, "00000010", message)
    if message == "(2, 3, 10)":
        refuses(["evaluate", str(run)], capsys, "00000010: the parameter output.weight", message)


def test_a_resume_from_the_checkpoint_before_ends_the_same(
    run: Path, finished: Path, capsys
) -> None:
    from run_helpers import assert_same_runs

    flip(unfinish(run) / "checkpoints" / "00000010" / "numbers.json")
    assert cli.main(["train", "--resume", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "checksum" in printed
    assert "Going on from step 9" in printed
    assert_same_runs(run, finished)


def test_a_run_without_a_usable_checkpoint(run: Path, capsys) -> None:
    for path in (run / "checkpoints").iterdir():
        flip(path / "numbers.json")
    unfinish(run)
    for command in (["train", "--resume"], ["evaluate"]):
        refuses([*command, str(run)], capsys, "none of the 3 checkpoints", "numbers.json")
    shutil.rmtree(run / "checkpoints")
    refuses(["evaluate", str(run)], capsys, "checkpoints: holds no checkpoint")
    refuses(["train", "--resume", str(run)], capsys, "metrics.jsonl reaches step 10")


def change_line(number: int, change: Callable[[str], str]) -> Damage:
    def damage(run: Path) -> None:
        path = unfinish(run) / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        lines[number] = change(lines[number])
        path.write_text("".join(lines))

    return damage


def drop_setting(name: str) -> Damage:
    def damage(run: Path) -> None:
        path = run / "config.toml"
        lines = [line for line in path.read_text().splitlines() if not line.startswith(name)]
        path.write_text("\n".join(lines))

    return damage


def write(name: str, content: str) -> Damage:
    return lambda run: (run / name).write_text(content)


RUN_FILES = {
    "no settings": (lambda run: (run / "config.toml").unlink(), "not a run"),
    "a setting missing": (drop_setting("steps"), "config.toml: steps is missing"),
    "settings cut off": (lambda run: cut(run / "config.toml"), "config.toml"),
    "another width": (
        lambda run: (run / "config.toml").write_text(
            (run / "config.toml").read_text().replace("    6,", "    9,")
        ),
        "another configuration (hidden",
    ),
    "no description of the data": (lambda run: (run / "data.json").unlink(), "data.json"),
    "a description cut off": (lambda run: cut(run / "data.json"), "data.json: damaged"),
    "a description of other data": (
        lambda run: (run / "data.json").write_text(
            (run / "data.json").read_text().replace('"sha256": "', '"sha256": "0')
        ),
        "trained on other data",
    ),
    "no metrics": (
        lambda run: (unfinish(run) / "metrics.jsonl").unlink(),
        "metrics.jsonl: missing",
    ),
    "metrics cut off": (
        lambda run: cut(unfinish(run) / "metrics.jsonl"),
        "metrics.jsonl: its first",
    ),
    "a digit of the metrics": (
        change_line(1, lambda line: line.replace('"seed": 1', '"seed": 2')),
        "metrics.jsonl: its first",
    ),
    "a line of the metrics": (change_line(2, lambda line: ""), "metrics.jsonl: its first"),
    "a result cut off": (lambda run: cut(run / "result.json"), "result.json: damaged"),
    "a result of nothing": (write("result.json", "{}"), "result.json: damaged"),
    "a result of bytes": (
        lambda run: (run / "result.json").write_bytes(b"\xff\0"),
        "result.json: damaged",
    ),
}


@pytest.mark.parametrize("case", RUN_FILES)
def test_a_damaged_file_of_a_run_ends_a_resume(case: str, run: Path, capsys) -> None:
    damage, message = RUN_FILES[case]
    damage(run)
    refuses(["train", "--resume", str(run)], capsys, str(run), message)


def test_metrics_of_which_a_line_is_damaged_are_not_read(run: Path) -> None:
    from pjax.lab.recording import read_records

    original = (run / "metrics.jsonl").read_text()
    whole = len(read_records(run))
    (run / "metrics.jsonl").write_text(original + '{"step": 12, "ep')
    assert len(read_records(run)) == whole  # a line that a killed process cut
    for line in ("[]", "{}", "x", original.splitlines()[0].replace('"step": 0', '"step": "0"')):
        (run / "metrics.jsonl").write_text(original + line + "\n")
        with pytest.raises(RunError, match=r"metrics\.jsonl: line 9 is damaged"):
            read_records(run)


def save(array: object, **options) -> Damage:
    return lambda path: np.save(path, array, **options)  # pyright: ignore[reportArgumentType]


def huge_header(path: Path) -> None:
    """Rows of which there are none, by the header terabytes of them."""
    np.save(path, np.zeros((9, 64), np.float32))
    content = path.read_bytes()
    honest, claimed = b"(9, 64), }" + 9 * b" ", b"(9999999999, 64), }"
    assert honest in content
    path.write_bytes(content.replace(honest, claimed))


class Pickled:
    """Would write a file if it were unpickled."""

    def __reduce__(self):
        return (Path.write_text, (Path("unpickled"), "x"))


INPUTS = {
    "rows.npy too narrow": (save(np.zeros((3, 63))), "shape (3, 63), (rows, 64) expected"),
    "rows.npy of one axis": (save(np.zeros(64)), "(rows, 64) expected"),
    "rows.npy of no rows": (save(np.zeros((0, 64))), "holds no rows"),
    "rows.npy of texts": (save(np.full((2, 64), "x")), "numbers expected"),
    "rows.npy complex": (save(np.zeros((2, 64), complex)), "numbers expected"),
    "rows.npy not finite": (save(np.full((2, 64), np.nan)), "row 1 holds a value"),
    "rows.npy pickled": (save(np.array([Pickled()], object), allow_pickle=True), "rows.npy"),
    "rows.npy empty": (lambda path: path.write_bytes(b""), "rows.npy"),
    "rows.npy of noise": (lambda path: path.write_bytes(b"\x93NUMPY\1\0zz"), "rows.npy"),
    "rows.npy huge": (huge_header, "mmap length is greater than file size"),
    "rows.npy missing": (lambda path: None, "cannot be read"),
    "rows.csv empty": (lambda path: path.write_text(""), "holds no rows"),
    "rows.csv of words": (lambda path: path.write_text("a,b\n"), "not an array"),
    "rows.csv ragged": (lambda path: path.write_text("1,2\n3\n"), "not an array"),
    "rows.csv narrow": (lambda path: path.write_text("1,2\n"), "(rows, 64) expected"),
    "rows.txt": (lambda path: path.write_text("1"), "a .npy or a .csv file expected"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_rows_that_cannot_be_predicted(
    case: str, finished: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, message = INPUTS[case]
    path = tmp_path / case.split()[0]
    damage(path)
    refuses(["predict", str(finished), "--input", str(path)], capsys, str(path), message)
    assert not (tmp_path / "unpickled").exists()


def test_a_seed_that_a_run_does_not_have(finished: Path, tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((1, 64)))
    arguments = ["predict", str(finished), "--input", str(tmp_path / "rows.npy")]
    refuses([*arguments, "--seed", "7"], capsys, "--seed 7: the run has the seeds (0, 1)")


def test_settings_of_the_tests_are_valid() -> None:
    assert TINY.problem() is None
