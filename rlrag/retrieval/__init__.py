"""Retrievers and indexes: find ranked candidates for a question."""
