"""Verdicts of a language model as judge: their agreement with other labels, and a table."""
