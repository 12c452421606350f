"""`python -m drkl` is the command `drkl`."""

from drkl.cli import main

if __name__ == "__main__":
    main()
