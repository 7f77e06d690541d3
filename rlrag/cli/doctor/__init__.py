"""Checks, before a run starts, of everything that would keep it from working.

`rlrag doctor` runs the checks; each is a function that returns an `Answer`. Neither Ray
nor a GPU need be there, and vLLM is never imported.
"""
