"""The service, from the root of a checkout: `serve run serve.app:build bundle=DIR`."""
