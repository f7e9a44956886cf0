"""The gradient instrument: what training's micro-batches give a router, against the exact gradient."""
