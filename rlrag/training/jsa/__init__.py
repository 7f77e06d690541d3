"""The JSA trainer: retriever and generator. Open `trainer.py` first."""
