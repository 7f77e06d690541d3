"""Checks that run before training and report what would make a run fail.

`rlrag doctor` runs the checks; each is a function that returns an `Answer`. Neither Ray
nor a GPU need be there, and vLLM is never imported.
"""
