"""The `pjax` command, also `python -m pjax`: the laboratory's command line."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs `pjax.lab.cli`; without the packages of the extra `lab`, says how to install them."""
    try:
        from pjax.lab import cli
    except ImportError as error:
        print(f"pjax: {error}", file=sys.stderr)
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
