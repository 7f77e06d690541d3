"""The OpenRAG trainer: the retriever. Open `trainer.py` first."""
