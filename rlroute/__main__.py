"""``python -m rlroute``: the command line without its script."""

from rlroute.experiments.cli.main import main

if __name__ == "__main__":
    main()
