"""Model directories: where they lie, how they are opened, their adapters and licences."""
