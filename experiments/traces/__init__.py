"""Which experts a model chose: traces of other programs and of our own runs, measured, shown and written."""
