"""A pool of engines as Ray actors, and the client that sends them prompts and weights."""
