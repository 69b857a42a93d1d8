"""An option of the suite's measurements."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--rounds", type=int, default=9, help="how often each step takes its turn")
