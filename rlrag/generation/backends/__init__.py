"""Engines: vLLM, transformers and OpenAI-compatible servers."""
