"""Encodes texts as unit vectors with a sentence-transformers model.

Shape letters: B texts, D vector length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlrag.errors import ConfigError, DataError
from rlrag.models.directories import resolve_device, resolve_dtype, weights_hash
from rlrag.retrieval.role_directories import has_encoder_each, role_directory
from rlrag.retrieval.trainable.protocol import Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BATCH_SIZE = 64
"""Texts in one forward pass, which keeps a core or a small GPU busy."""
_PROMPTS: Mapping[Role, tuple[str, ...]] = {
    "question": ("query",),
    "passage": ("document", "passage", "corpus"),
}


def prompt_of(model: SentenceTransformer, role: Role) -> str:
    """What a model asks to stand before the texts of a role.

    That is one of its prompts by the names that sentence-transformers has for the roles. A model
    with none for either role has its default prompt before both.
    """
    found = {
        each: next((prompt for name in names if (prompt := model.prompts.get(name))), "")
        for each, names in _PROMPTS.items()
    }
    if any(found.values()) or model.default_prompt_name is None:
        return found[role]
    return model.prompts[model.default_prompt_name] or ""


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """What determines an encoder's vectors; equal identities give equal vectors."""

    weights_hash: str
    dtype: str
    max_tokens: int


class Encoder(Protocol):
    """Turns texts into vectors whose inner product says how alike the texts are."""

    @property
    def identity(self) -> EncoderIdentity:
        """Weights, number format and longest text."""
        ...

    @property
    def size(self) -> int:
        """Length of a vector (D)."""
        ...

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        """One float32 vector of Euclidean length 1 for each text, shape (B, D)."""
        ...


class TextEncoder:
    """A sentence-transformers model for questions and passages, or one for each.

    Passages, of which there are many, are encoded in the number format that is asked for, questions
    in float32. In bfloat16 a vector depends by some thousandths on the batch that it is padded and
    multiplied in, which moves passages of nearly equal scores: a service would find others than the
    evaluation that it is compared with.

    What the model puts before the texts of a role is read with them, see `prompt_of`.

    The model is loaded by the first call that needs it, so that a run which finds all its vectors
    on disk never loads it. Texts are sorted by length before they are cut into batches.

    Args:
        model_dir: Directory of the model, as `rlrag.models.directories.resolve_model` gives it, or
            one with the two, see `role_directories`.
        dtype: `auto`, `float32` or `bfloat16`, for passages; the vectors are float32.
        max_tokens: Tokens of a text that are read.
        batch_size: Texts in one forward pass.
    """

    def __init__(
        self, model_dir: Path, dtype: str, max_tokens: int, batch_size: int = BATCH_SIZE
    ) -> None:
        self._model_dir = model_dir
        self._batch_size = batch_size
        self._device = resolve_device("auto")
        self._has_each = has_encoder_each(model_dir)
        self._identity = EncoderIdentity(
            weights_hash=weights_hash(role_directory(model_dir, "passage")),
            dtype=resolve_dtype(dtype, self._device),
            max_tokens=max_tokens,
        )

    @property
    def identity(self) -> EncoderIdentity:
        """Weights of the passages' encoder, number format and longest text."""
        return self._identity

    @property
    def question_weights_hash(self) -> str | None:
        """Of the questions' encoder; None where it is that of the passages."""
        return weights_hash(self._model_dir / "question") if self._has_each else None

    @property
    def size(self) -> int:
        """Length of a vector (D)."""
        size = self._for_passages.get_embedding_dimension()
        if size is None:
            raise ConfigError(
                f"the encoder {self._model_dir} does not declare its vector size; use a "
                "sentence-transformers model with a pooling module"
            )
        return size

    @cached_property
    def _for_passages(self) -> SentenceTransformer:
        return self._load("passage", self._identity.dtype)

    @cached_property
    def _for_questions(self) -> SentenceTransformer:
        shared = self._identity.dtype == "float32" and not self._has_each
        return self._for_passages if shared else self._load("question", "float32")

    def _load(self, role: Role, dtype: str) -> SentenceTransformer:
        import torch
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(
            str(role_directory(self._model_dir, role)),
            device=self._device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": getattr(torch, dtype)},
        )
        limit = getattr(model.tokenizer, "model_max_length", None)
        if limit is not None and self._identity.max_tokens > limit:
            raise ConfigError(
                f"retrieval.encoder_max_tokens is {self._identity.max_tokens}, but the encoder "
                f"{self._model_dir} reads at most {limit} tokens; lower it"
            )
        model.max_seq_length = self._identity.max_tokens
        return model

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each passage, those beyond the longest text read included.

        The model itself is not loaded for it.
        """
        from transformers import AutoTokenizer

        directory = role_directory(self._model_dir, "passage")
        modules = directory / "modules.json"  # older models lie in the folder of their first module
        first = json.loads(modules.read_text())[0]["path"] if modules.is_file() else ""
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                directory / first, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError):  # a tokenizer of another library, which comes with the model
            tokenizer = self._for_passages.tokenizer
        return [len(ids) for ids in tokenizer(list(texts), truncation=False)["input_ids"]]

    def encode(self, texts: Sequence[str], role: Role = "passage") -> np.ndarray:
        """One float32 vector of Euclidean length 1 for each text, shape (B, D).

        Raises:
            DataError: naming the first text whose vector is zero or not finite.
        """
        if not texts:
            return np.zeros((0, self.size), dtype=np.float32)
        model = self._for_questions if role == "question" else self._for_passages
        vectors_BD = model.encode(
            list(texts),
            prompt=prompt_of(model, role),
            batch_size=self._batch_size,
            show_progress_bar=False,
        )
        # Lengths are taken after the conversion: in bfloat16 they would be off by up to 0.4 %.
        vectors_BD = np.asarray(vectors_BD, dtype=np.float32)
        lengths_B = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
        unusable = np.flatnonzero(~np.isfinite(lengths_B[:, 0]) | (lengths_B[:, 0] == 0))
        if len(unusable):
            first = int(unusable[0])
            raise DataError(
                f"the encoder {self._model_dir} returned a vector of norm "
                f"{float(lengths_B[first, 0])} from {texts[first][:80]!r}; set "
                "retrieval.encoder_dtype to float32 or use another encoder"
            )
        return vectors_BD / lengths_B
