"""Selection policies: from candidates to a distribution over ordered selections."""
