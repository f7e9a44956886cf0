"""Weights of trained runs and of others: as models and layers of ours, and as files for elsewhere."""
