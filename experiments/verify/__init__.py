"""Whether stored runs are what they say: everything in a record that can be computed again, computed again."""
