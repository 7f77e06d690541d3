"""Reward functions: score a generated answer."""
