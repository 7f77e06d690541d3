"""A recipe and this machine in; what would keep a run from working, before it starts, out.

`rlrag doctor` runs the checks; each is a function that returns an `Answer`. Neither Ray
nor a GPU need be there, and vLLM is never imported.
"""
