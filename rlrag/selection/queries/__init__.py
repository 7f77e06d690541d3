"""Query writers: from a question and what was picked to the next search of an episode."""
