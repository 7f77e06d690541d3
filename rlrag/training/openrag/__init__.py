"""The OpenRAG trainer: trains the retriever. Open `trainer.py` first."""
