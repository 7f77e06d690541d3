"""Entry point of a checkout for Ray Serve: `serve run serve.app:build bundle=DIR`."""
