"""Trainable encoders, and retrieval with them during training."""
