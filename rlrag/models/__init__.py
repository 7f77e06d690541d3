"""Finds and loads model directories; adapters, licences."""
