"""How runs are described, started, watched and taken up again."""
