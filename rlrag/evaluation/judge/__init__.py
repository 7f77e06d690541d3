"""What a language model judged: agreement and the table of its verdicts."""
