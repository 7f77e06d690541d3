"""Retrieval with sparse vectors over a vocabulary (semi-parametric)."""
