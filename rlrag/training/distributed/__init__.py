"""Distributed training: worker collectives, sharding, weights for the engines."""
