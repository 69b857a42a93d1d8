"""Checks on eight CPU devices, in processes of their own: the others have one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


CHECKS = ("checks_data_parallel", "checks_parameters", "checks_modes", "checks_stages")


def test_on_eight_devices():
    """In one process: most of the time is that of starting and compiling."""
    run()


@pytest.mark.slow
def test_all_on_eight_devices():
    run("-m", "slow")


def run(*options: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    found = subprocess.run(
        [*command, *options, *(str(HERE / f"{name}.py") for name in CHECKS)],
        cwd=HERE.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
