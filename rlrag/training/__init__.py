"""Training: loop, launchers, learners and algorithms."""
