"""Sparse retrieval with vectors over a vocabulary (semi-parametric)."""
