"""``python -m rlroute.experiments.cli``: the command line without its script."""

from rlroute.experiments.cli.main import main

main()
