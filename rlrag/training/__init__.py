"""Experience, learner, checkpoints and the loop."""
