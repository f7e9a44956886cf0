"""Tests of rlroute; the tree mirrors the package."""
