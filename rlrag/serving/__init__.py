"""The HTTP service on Ray Serve: answers with a bundle as it was evaluated.

`rlrag serve runs/quickstart/bundle` starts it with Ray Serve.
"""
