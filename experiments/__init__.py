"""Everything that runs: the command line, recipes, comparisons, sweeps, reports."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
"""The published results, which ship with the package."""
