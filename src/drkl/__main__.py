"""`python -m drkl` is the command `drkl`."""

from __future__ import annotations

import sys

from drkl.signals import handled, ignore


def main() -> None:
    """Run the command line; what ends it from outside is handled from the first import on."""
    try:
        with handled(["drkl", *sys.argv[1:]]):
            from drkl.cli import main as run

            run()
    finally:
        ignore()


if __name__ == "__main__":
    main()
