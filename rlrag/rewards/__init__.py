"""Rewards: from a generation and its golden answers to a number."""
