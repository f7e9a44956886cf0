"""Gymnasium environments in which routing is the action."""
