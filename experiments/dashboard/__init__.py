"""A live page over a run store, on loopback."""
