"""The HTTP side of the service: routes, schemas, limits."""
