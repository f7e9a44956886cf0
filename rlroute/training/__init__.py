"""Everything between a configuration and a trained, recorded run: data, loop, optimizer, evaluation, checkpoints."""
