"""Workers of a training run: collectives, sharding, weights on their way to engines."""
