"""Weights of others as layers of ours."""
