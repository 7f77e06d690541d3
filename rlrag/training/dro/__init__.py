"""The DRO trainer: trains selector and generator. Open `trainer.py` first."""
