"""`python -m drkl` is the command `drkl`."""

import os
import sys

# Python looks for modules in the current folder first, where a file may be called torch.py or yaml.py. Only a checkout
# that is not installed is itself read from there.
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()) and os.getcwd() != _HERE:
    del sys.path[0]

if __name__ == "__main__":
    from drkl.cli import main

    main()
