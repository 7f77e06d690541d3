"""The JSA trainer: trains retriever and generator. Open `trainer.py` first."""
