"""`pjax train` in several processes on loopback: the run of one process, also after a kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax.lab import checkpoints
from pjax.lab.recording import JSON_LINES

TRAIN = [
    "train", "--dataset", "digits", "--hidden", "16", "--steps", "50", "--batch-size", "32",
    "--measure-every", "10", "--checkpoint-every", "10", "--keep", "9", "--name", "run",
]  # fmt: skip
#: What all wait for at most, in seconds.
LONGEST = 240


def start(arguments: list[str], devices: int, folder: Path) -> subprocess.Popen[str]:
    """A `pjax` process with so many CPU devices, in float64."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "COLUMNS": "500",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pjax", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_both(arguments: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    return [start([*arguments, *where, str(i)], 2, folder) for i in range(2)]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status and output of each; what hangs is ended and fails."""
    found = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=LONGEST)
            found.append((process.returncode, out, error))
    finally:
        for process in processes:
            process.kill()
    return found


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    return checkpoints.load(run / "checkpoints" / f"{step:08d}").arrays


def check_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], most: float) -> None:
    """All arrays, relative to the largest entry of each. The signs of eigenvectors are rounding."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        if ".vectors" not in name:
            size = np.max(np.abs(array), initial=0)
            np.testing.assert_allclose(found[name], array, atol=most * size, rtol=0, err_msg=name)


def wait_for(step: int, run: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Until the metrics tell of a step."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        lines = run / JSON_LINES
        if lines.exists() and f'"step": {step},' in lines.read_text():
            return
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"no step {step}")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    said = finish(start_both(TRAIN, folder))
    assert [status for status, _, _ in said] == [0, 0], said
    return folder / "runs" / "run", said


@pytest.mark.slow
def test_two_processes_are_one(together, tmp_path):
    run, said = together
    (alone,) = finish([start([*TRAIN, "--devices", "4"], 4, tmp_path)])
    assert alone[0] == 0, alone
    check_close(arrays(run, 50), arrays(tmp_path / "runs" / "run", 50), 1e-12)
    lines = [line for line in said[1][1].splitlines() if not line.startswith("[Gloo]")]
    assert not lines  # process 0 speaks for all
    assert "best step" in said[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(killed, together, tmp_path):
    longer = [*TRAIN]
    longer[longer.index("--steps") + 1] = "100000"
    processes = start_both(longer, tmp_path)
    run = tmp_path / "runs" / "run"
    wait_for(20, run, processes)
    processes[killed].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    said = finish(processes)[1 - killed]
    assert time.monotonic() - begin < 60
    assert said[0] not in (0, None)
    assert "another process of this run has ended" in said[2], said
    assert "pjax train --resume" in said[2]


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_on_other_devices(together, tmp_path):
    run, _ = together
    processes = start_both(TRAIN, tmp_path)
    half = tmp_path / "runs" / "run"
    wait_for(20, half, processes)
    for process in processes:
        process.kill()
        process.communicate()
    assert not (half / "result.json").exists()
    said = finish(start_both(["train", "--resume", str(half)], tmp_path))
    assert [status for status, _, _ in said] == [0, 0], said
    expected = arrays(run, 50)
    for name, array in arrays(half, 50).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    # On one device, from the same checkpoints.
    for step in (50, 40, 30):
        checkpoints._remove(half / "checkpoints" / f"{step:08d}")
    (half / "result.json").unlink()
    (one,) = finish([start(["train", "--resume", str(half), "--devices", "1"], 1, tmp_path)])
    assert one[0] == 0, one
    check_close(arrays(half, 50), expected, 1e-10)


@pytest.mark.slow
def test_columns_of_weights_on_devices_change_nothing(tmp_path):
    """A mesh of two axes, and two seeds that train side by side."""
    several = [*TRAIN, "--seeds", "0", "1"]
    for name, devices in (("one", "1"), ("four", "4")):
        (tmp_path / name).mkdir()
        mesh = ["--mesh", "data=2,model=2"] if devices == "4" else []
        (said,) = finish([start([*several, *mesh], int(devices), tmp_path / name)])
        assert said[0] == 0, said
    one, four = (arrays(tmp_path / name / "runs" / "run", 50) for name in ("one", "four"))
    check_close(four, one, 1e-11)


def test_options_that_do_not_fit(capsys):
    from pjax.lab import cli

    for options, text in (
        (["--num-processes", "2"], "need --coordinator HOST:PORT"),
        (["--coordinator", "here"], "must be HOST:PORT or auto"),
        (["--coordinator", "localhost:1"], "needs --num-processes and --process-id"),
        (
            ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be from 0 to 1",
        ),
        (["--mesh", "rows=2"], "--mesh takes sizes for the axes data and model"),
        (["--mesh", "data=2,data=2"], "names data twice"),
        (["--devices", "4096"], "--mesh data=4096 needs 4096 devices"),
        (["--devices", "0"], "--devices takes a positive number"),
    ):
        assert cli.main(["train", *options]) == 1
        assert text in capsys.readouterr().err
