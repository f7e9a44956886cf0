"""Stored runs as a page and as lists."""
