"""Routers that learn from reward; a file here is a router."""
