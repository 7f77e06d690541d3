"""The off-policy trainer: trains the selector on feedback of a service. Open `trainer.py` first."""
