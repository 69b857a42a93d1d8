"""Measures steps side by side, prints tables, draws the figure, compares two measurements.

    python -m benchmarks.suite run [--groups networks depth width batch length loop]
        [--steps ...] [--quick] [--rounds 9] [--out runs/benchmarks/suite.json]
    python -m benchmarks.suite show FILE
    python -m benchmarks.suite compare OLD NEW
    python -m benchmarks.suite figure FILE [--out docs/images/depth.png]
    python -m benchmarks.suite reach FILE

`run` is pytest-benchmark, whose JSON describes the machine and the commit too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.suite.cases import STEPS, cases
from benchmarks.suite.reach import steps_needed
from pjax.lab.plots import method_style

GROUPS = tuple(dict.fromkeys(case.group for case in cases()))
_COLUMNS = (
    "ms", "x backprop", "x floor", "temp MB", "x backprop", "moved MB", "trace s", "lower s",
    "XLA s", "first s",
)  # fmt: skip
Rows = dict[str, dict[str, Any]]


def read(path: str) -> tuple[str, Rows]:
    """What was measured where, and the measurements by case and step."""
    try:
        content = json.loads(Path(path).read_text())
        rows = [found["extra_info"] for found in content["benchmarks"]]
        by_key = {f"{row['group']}/{row['case']}:{row['step']}": row for row in rows}
        first = rows[0]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise SystemExit(f"{path} is no file of `benchmarks.suite run`: {error!r}") from error
    machine = content["machine_info"]
    described = (
        f"JAX {first['jax']} on {first['device']} ({machine.get('machine')}, "
        f"{machine.get('cpu', {}).get('count')} cores), {content['datetime'][:10]}: matrix product "
        f"{first['flops_per_second'] / 1e9:.0f} GFLOP/s, copy "
        f"{first['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    return described, by_key


def show(path: str) -> None:
    described, rows = read(path)
    print(described)
    width = max(len(row["case"]) for row in rows.values()) + 2
    for group in dict.fromkeys(row["group"] for row in rows.values()):
        print(f"\n{group}")
        print(f"{'':{width}s}{'step':14s}" + "".join(f"{c:>11s}" for c in _COLUMNS))
        for row in rows.values():
            if row["group"] == group:
                base = rows.get(f"{group}/{row['case']}:{STEPS[0]}", row)
                print(f"{row['case']:{width}s}{row['step']:14s}" + _cells(row, base))


def _cells(row: dict[str, Any], base: dict[str, Any]) -> str:
    numbers = (
        1e3 * row["seconds"],
        row["ratio"],
        row["seconds"] / row["floor_seconds"],
        row["temporaries"] / 1e6,
        row["temporaries"] / max(base["temporaries"], 1),
        row["bytes_moved"] / 1e6,
        row["trace_seconds"],
        row["lower_seconds"],
        row["compile_seconds"],
        row["first_seconds"],
    )
    return "".join(f"{number:11.2f}" for number in numbers)


def compare(old: str, new: str) -> None:
    """Ratios to backprop and counts, before and after: what another machine does not change."""
    (before, a), (after, b) = read(old), read(new)
    print(f"old: {before}\nnew: {after}")
    columns = {
        "x backprop": ("ratio", 1),
        "temp MB": ("temporaries", 1e6),
        "GFLOP": ("flops", 1e9),
        "moved MB": ("bytes_moved", 1e6),
        "XLA s": ("compile_seconds", 1),
    }
    width = max(len(key) for key in (*a, *b)) + 2
    print(f"{'':{width}s}" + "".join(f"{column:>27s}" for column in columns))
    for key, now in b.items():
        if key not in a:
            continue
        pairs = [(a[key][name] / unit, now[name] / unit) for name, unit in columns.values()]
        cells = (f"{x:9.2f} →{y:9.2f} {(y / x if x else 1):5.2f}x" for x, y in pairs)
        print(f"{key:{width}s}" + "".join(f"{cell:>27s}" for cell in cells))
    for name, missing in (("old", set(b) - set(a)), ("new", set(a) - set(b))):
        if missing:
            print(f"not in {name}: {', '.join(sorted(missing))}")


def figure(path: str, out: str) -> None:
    """Time of a step against depth, on logarithmic axes, for each step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    described, rows = read(path)
    drawing, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    drawn = {
        "backprop": ("Adam", "adam"),
        "displacement": ("Adam on displacements", "displacement-adam"),
        "projection": ("projection", "projection"),
        "parallel": ("one step of alternating projections", "ap"),
    }
    for step in STEPS:
        label, method = drawn[step]
        points = sorted(
            (row["number"], 1e3 * row["seconds"])
            for row in rows.values()
            if row["group"] == "depth" and row["step"] == step
        )
        if points:
            axes.loglog(*zip(*points, strict=True), label=label, **method_style(method))
    depths = sorted({row["number"] for row in rows.values() if row["group"] == "depth"})
    axes.set_xticks(depths, map(str, depths))
    axes.minorticks_off()
    axes.set(xlabel="hidden layers of 128", ylabel="ms a step, batch 256")
    axes.set_title(described.split(":")[0], fontsize="small")
    axes.grid(alpha=0.3)
    axes.legend()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(out, dpi=150)
    print(f"wrote {out}")


def reach(path: str) -> None:
    """The parallel steps that a batch needs at each depth, and how long a training step then is."""
    _, rows = read(path)
    columns = ("steps", "parallel ms", "all ms", "displacement", "backprop")
    print(f"{'':8s}" + "".join(f"{column:>14s}" for column in columns))
    for case in cases():
        row = rows.get(f"{case.key}:parallel")
        if case.group != "depth" or row is None:
            continue
        needed = steps_needed(case.task, *case.arrays(), most=2 * case.number + 8)
        one = 1e3 * row["seconds"]
        others = (rows.get(f"{case.key}:{step}") for step in ("displacement", "backprop"))
        cells = [
            "more" if needed is None else str(needed),
            f"{one:.1f}",
            "" if needed is None else f"{needed * one:.0f}",
            *("" if other is None else f"{1e3 * other['seconds']:.1f}" for other in others),
        ]
        print(f"{case.name:8s}" + "".join(f"{cell:>14s}" for cell in cells), flush=True)


def run(options: argparse.Namespace) -> int:
    """pytest-benchmark over the chosen cases, then the table."""
    chosen = [
        f"{Path(__file__).parent / 'test_steps.py'}::test_step[{case.key}:{step}]"
        for case in cases()
        if case.group in options.groups and (case.quick or not options.quick)
        for step in case.steps
        if step in options.steps
    ]
    if not chosen:
        raise SystemExit("No case of the suite is in these groups.")
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--benchmark-only",
        f"--benchmark-json={options.out}", f"--rounds={options.rounds}",
        "--benchmark-columns=median", "--override-ini=addopts=", *chosen,
    ]  # fmt: skip
    code = subprocess.call(command)
    if code == 0:
        show(options.out)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description="The cost of steps beside backprop."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure, and print a table")
    running.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    running.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    running.add_argument("--quick", action="store_true", help="small networks, for a minute or two")
    running.add_argument("--rounds", type=int, default=9)
    running.add_argument("--out", default="runs/benchmarks/suite.json")
    commands.add_parser("show", help="print the table of a file").add_argument("file")
    comparing = commands.add_parser("compare", help="two files side by side")
    comparing.add_argument("old")
    comparing.add_argument("new")
    drawing = commands.add_parser("figure", help="step time against depth")
    drawing.add_argument("file")
    drawing.add_argument("--out", default="runs/benchmarks/depth.png")
    reaching = commands.add_parser("reach", help="parallel steps that a batch needs at each depth")
    reaching.add_argument("file")
    options = parser.parse_args()
    if options.command == "run":
        raise SystemExit(run(options))
    if options.command == "show":
        show(options.file)
    elif options.command == "compare":
        compare(options.old, options.new)
    elif options.command == "reach":
        reach(options.file)
    else:
        figure(options.file, options.out)


if __name__ == "__main__":
    main()
