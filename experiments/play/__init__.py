"""Games in which routing is the action, and who plays them."""
