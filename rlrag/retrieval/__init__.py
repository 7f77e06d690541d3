"""Retrievers and indexes: from a question to its candidates in the retriever's order."""
