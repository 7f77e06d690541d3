"""Tokenizer of a vocabulary encoder, and bags of tokens.

The columns of vocabulary space are the ordinary tokens in the order of their ids: special tokens
and `[unusedN]` have none. For `bert-base-uncased` these are the ids 999 to 30521.

Shape letters: B texts, T positions, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array

from rlrag.errors import ConfigError
from rlrag.retrieval.manifest import digest

_UNUSED = re.compile(r"\[unused\d+\]")


class Vocabulary:
    """The tokenizer of an encoder into vocabulary space.

    Args:
        model_dir: Directory with the tokenizer.
        max_tokens: Tokens of a text that are read, special tokens included.

    Raises:
        ConfigError: when there is no tokenizer, or it reads fewer tokens.
    """

    def __init__(self, model_dir: Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                model_dir, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{model_dir} has no tokenizer that transformers can load ({error}); set "
                "retrieval.vocabulary_encoder to a masked language model"
            ) from error
        check_max_tokens(max_tokens, tokenizer.model_max_length, model_dir)
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        special = set(tokenizer.all_special_ids)
        tokens = tokenizer.get_vocab()
        self.num_tokens = 1 + max(tokens.values())
        """Smallest number of embeddings that a model needs for this tokenizer."""
        self.token_ids_V = np.array(
            sorted(
                token_id
                for token, token_id in tokens.items()
                if token_id not in special and not _UNUSED.fullmatch(token)
            ),
            dtype=np.int64,
        )
        """Token id of every column."""
        self._column_of_id = np.full(self.num_tokens, -1, dtype=np.int64)
        self._column_of_id[self.token_ids_V] = np.arange(len(self.token_ids_V))

    @property
    def size(self) -> int:
        """Number of columns (V)."""
        return len(self.token_ids_V)

    @cached_property
    def identity(self) -> str:
        """First 16 hex digits of a SHA-256 over everything that decides a text's tokens.

        How the tokenizer was last asked to cut and pad is written into its files, and left out.
        """
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            rules = {"class": type(self._tokenizer).__name__, **self._tokenizer.get_vocab()}
        else:
            rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        return digest([rules, self._tokenizer.truncation_side, self.max_tokens])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to the longest text read."""
        if not texts:
            return []
        return self._tokenizer(list(texts), truncation=True, max_length=self.max_tokens)[
            "input_ids"
        ]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, those beyond the longest text read included."""
        return [len(ids) for ids in self._tokenizer(list(texts), truncation=False)["input_ids"]]

    def padded(self, token_ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids of shape (B, T), and where they are no padding."""
        lengths_B = torch.tensor([len(ids) for ids in token_ids])
        mask_BT = torch.arange(int(lengths_B.max())) < lengths_B.unsqueeze(1)
        ids_BT = torch.full(mask_BT.shape, self._tokenizer.pad_token_id or 0)
        ids_BT[mask_BT] = torch.tensor([each for ids in token_ids for each in ids])
        return ids_BT, mask_BT

    def bags(self, token_ids: Sequence[Sequence[int]]) -> csr_array:
        """A 1 in the column of every ordinary token that each text holds, float32, (B, V)."""
        columns = [np.unique(self._column_of_id[np.array(ids, dtype=int)]) for ids in token_ids]
        columns = [each[each >= 0] for each in columns]
        starts = np.cumsum([0, *map(len, columns)])
        indices = np.concatenate([np.zeros(0, dtype=np.int64), *columns]).astype(np.int32)
        ones = np.ones(len(indices), dtype=np.float32)
        return csr_array((ones, indices, starts), shape=(len(columns), self.size))

    def save_pretrained(self, directory: Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save_pretrained(directory)


def check_max_tokens(max_tokens: int, limit: int | None, model_dir: Path) -> None:
    """Refuse to read more tokens of a text than the model can.

    Raises:
        ConfigError: naming both numbers.
    """
    if limit is not None and max_tokens > limit:
        raise ConfigError(
            f"retrieval.encoder_max_tokens is {max_tokens}, but the encoder {model_dir} reads at "
            f"most {limit} tokens; lower it"
        )
