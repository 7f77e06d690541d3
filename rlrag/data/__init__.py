"""Reads corpora and question sets from files, validates and hashes them."""
