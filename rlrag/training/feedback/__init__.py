"""Off-policy training of the selector on a service's feedback. Open `trainer.py` first."""
