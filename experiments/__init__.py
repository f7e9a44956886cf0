"""Everything that runs: the command line, recipes, comparisons, sweeps, reports."""
