"""The HTTP interface of the service: routes, schemas, limits."""
