"""Encoders in training, and retrieval with them."""
