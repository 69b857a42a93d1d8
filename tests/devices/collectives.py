"""What devices exchange in a compiled program: read from its text."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)


class Collective(NamedTuple):
    """One exchange.

    **Attributes:**

    - `kind`: one of `KINDS`.
    - `shapes`: of the arrays that come out.
    - `bytes`: of these.
    - `looped`: whether it is in the body of a loop.
    - `branch`: whether it is in a branch of a conditional.
    - `name`: where the program has it from.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    looped: bool
    branch: bool
    name: str


def collectives(compiled: Any) -> list[Collective]:
    """The exchanges of a compiled program."""
    computations = _computations(compiled.as_text())
    looped = _reached(computations, " while(")
    branches = _reached(computations, " conditional(")
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = re.match(
                rf"\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line
            )
            if match is None:
                continue
            arrays = [
                (kind, tuple(int(n) for n in sizes.split(",") if n))
                for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            ]
            size = sum(_BYTES.get(kind, 8) * math.prod(shape) for kind, shape in arrays)
            origin = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    match[2],
                    tuple(shape for _, shape in arrays),
                    size,
                    name in looped,
                    name in branches,
                    origin[1] if origin else "",
                )
            )
    return found


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\) -> .*\{", line)
        if match:
            lines = found.setdefault(match[1], [])
        else:
            lines.append(line)
    return found


def _reached(computations: dict[str, list[str]], operation: str) -> set[str]:
    """The computations that operations of a kind call, and all that these call."""
    found: set[str] = set()
    called = [
        _called(line) for lines in computations.values() for line in lines if operation in line
    ]
    waiting = [name for names in called for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found and name in computations:
            found.add(name)
            waiting += [other for line in computations[name] for other in _called(line)]
    return found


def _called(line: str) -> list[str]:
    found = []
    for one, several in _CALLED.findall(line):
        found += [one] if one else re.findall(r"%?([\w.-]+)", several)
    return found
