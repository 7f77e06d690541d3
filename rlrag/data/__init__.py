"""Readers and built-in texts: from files to passages and questions, checked and hashed."""
