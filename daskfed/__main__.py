"""``python -m daskfed``: the command line."""

from daskfed.cli import main

if __name__ == "__main__":
    main()
