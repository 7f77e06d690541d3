"""The DRO trainer: selector and generator trained by the answers. Open `trainer.py` first."""
