"""Versions of a bundle in the service: loaded, checked, compared, given roles."""
