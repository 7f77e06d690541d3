"""The HTTP service on Ray Serve: serves a bundle exactly as it was evaluated.

`rlrag serve runs/quickstart/bundle` starts it with Ray Serve.
"""
