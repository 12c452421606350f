"""`python -m drkl` is the command `drkl`."""

from __future__ import annotations

import sys

from drkl.signals import handled


def main() -> None:
    """Run the command line; what ends it from outside is handled from the first import on."""
    with handled(["drkl", *sys.argv[1:]]):
        from drkl.cli import main as run

        run()


if __name__ == "__main__":
    main()
