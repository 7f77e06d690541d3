"""Bundle versions in the service: loading, checks, comparison and roles."""
