"""Tests of rlroute; the tree mirrors the package."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
