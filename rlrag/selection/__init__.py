"""Selection policies: distributions over ordered selections of candidates."""
