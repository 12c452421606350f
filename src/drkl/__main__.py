"""`python -m drkl` is the command `drkl`."""

import os
import sys


def main() -> None:
    """Run the command line; what ends it from outside is handled from the first import on."""
    from drkl.signals import handled, ignore

    try:
        with handled(["drkl", *sys.argv[1:]]):
            from drkl.cli import main as run

            run()
    finally:
        ignore()


def _leave_current_folder() -> None:
    """Look for no module in the current folder, where a file may be called torch.py or yaml.py.

    Python looks there first. Only a checkout that is not installed is itself read from there.
    """
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        current = os.getcwd()
    except FileNotFoundError:  # it has been removed
        return
    if not sys.flags.safe_path and sys.path[0] in ("", current) and current != here:
        del sys.path[0]


if __name__ == "__main__":
    _leave_current_folder()
    main()
