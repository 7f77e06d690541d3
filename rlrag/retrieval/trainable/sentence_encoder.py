"""A trainable sentence-transformers encoder: its vectors have gradients.

Shape letters: B texts, D vector length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

from rlrag.errors import ConfigError
from rlrag.models.directories import resolve_device
from rlrag.retrieval.dense.encoder import prompt_of
from rlrag.retrieval.trainable.protocol import Embedded, Role


class TrainableTextEncoder(nn.Module):
    """What `TextEncoder` loads, in float32 and with a gradient; implements `TrainableEncoder`.

    Questions and passages share the weights; a text's role decides no more than what stands before
    it. Dropout is off also in training: the module never leaves evaluation mode.

    Args:
        model_dir: Directory of the model, as `rlrag.models.directories.resolve_model` gives it.
        max_tokens: Tokens of a text that are read.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: when the model reads fewer than `max_tokens` tokens.
    """

    def __init__(self, model_dir: Path, max_tokens: int, device: str = "auto") -> None:
        from sentence_transformers import SentenceTransformer

        super().__init__()
        self.model = SentenceTransformer(
            str(model_dir),
            device=resolve_device(device),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": torch.float32},
        )
        limit = getattr(self.model.tokenizer, "model_max_length", None)
        if limit is not None and max_tokens > limit:
            raise ConfigError(
                f"retrieval.encoder_max_tokens is {max_tokens}, but the encoder {model_dir} reads "
                f"at most {limit} tokens; lower it"
            )
        self._read_tokens = self.model.max_seq_length
        self.model.max_seq_length = max_tokens
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever is asked for: a vector is the same every time."""
        return super().train(False)

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        """Vectors of Euclidean length 1 of the texts, with gradient."""
        features = self.model.preprocess(list(texts), prompt=prompt_of(self.model, role))
        placed = {
            key: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for key, value in features.items()
        }
        vectors_BD = self.model(placed)["sentence_embedding"]
        return Embedded(nn.functional.normalize(vectors_BD, dim=-1))

    def save_pretrained(self, directory: Path) -> None:
        """Write a new directory from which `TextEncoder` loads these weights.

        Equal weights of one model are written as equal files: what a tokenizer remembers of the
        texts that it read last, how it cut and padded them, is left out.

        Raises:
            FileExistsError: when the directory exists.
        """
        directory.mkdir(parents=True)
        max_tokens = self.model.max_seq_length
        backend = getattr(self.model.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # each call sets both again
            backend.no_truncation()
            backend.no_padding()
        self.model.max_seq_length = self._read_tokens
        try:
            self.model.save_pretrained(str(directory), create_model_card=False)
        finally:
            self.model.max_seq_length = max_tokens
