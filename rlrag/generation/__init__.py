"""Prompts, generators and the actor pool: from a question and ordered passages to an answer."""
