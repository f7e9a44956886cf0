"""Looking inside a trained mixture: who is chosen for what, together with whom, since when, and what that is worth."""
