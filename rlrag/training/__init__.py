"""Training: loop, launch, learners and the algorithms."""
