"""Prompts, generators and the pool of engine actors: from question and passages to an answer."""
