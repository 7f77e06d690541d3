"""A trainable masked language model that encodes texts as sparse vectors over its vocabulary.

The encoder of the semi-parametric retriever (VDR, SiDR; OpenRAG, arXiv 2503.08398, section 3 and
appendix E). An entry stands for a word piece, so that a vector can be compared with another text's
vector, or with the bag of its tokens, which no weights are needed for.

    logits = H E^T + bias,   v = max over positions of ELU(logits) + 1,   then sparsified

E are the model's word embeddings without special tokens and `[unusedN]`. With the head `masked_lm`,
H is what the model's own head hands to its output layer, and the bias is that layer's; with
`layer_norm`, H is a new LayerNorm of the last hidden states without a bias, as in VDR. The released
code of VDR takes the maximum over padding too; here a vector does not depend on the batch.

Shape letters: B texts, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from scipy.sparse import csr_array

from rlrag.errors import ConfigError, DataError
from rlrag.retrieval.dense.encoder import BATCH_SIZE, EncoderIdentity
from rlrag.retrieval.role_directories import ROLES, has_encoder_each
from rlrag.retrieval.trainable.protocol import Embedded, Role
from rlrag.retrieval.vocabulary.model import VocabularyModel
from rlrag.retrieval.vocabulary.space import elu1p, kept_entries, max_logits, sparsified
from rlrag.retrieval.vocabulary.tokens import Vocabulary

TOP_K = 768
"""Entries of a vector that are kept, as in the papers on VDR and SiDR: as many as BERT's size."""
_SHARED = "shared"

Head = Literal["masked_lm", "layer_norm"]


class VocabularyEncoder(torch.nn.Module):
    """A masked language model as an encoder into vocabulary space.

    Dropout is off, also in training.

    Args:
        model_dir: Directory of the model, as `rlrag.models.directories.resolve_model` gives it, or
            one that `save_pretrained` wrote.
        max_tokens: Tokens of a text that are read.
        top_k: Largest entries of a vector that are kept, besides those of the text's own tokens.
        head: How hidden states reach the vocabulary.
        tied: One encoder for questions and passages, or one each that start alike.
        batch_size: Texts in one forward pass of `encode`.

    Raises:
        ConfigError: when the directory holds no masked language model with its own head, the
            tokenizer belongs to another model, `max_tokens` is more than the model reads, or the
            directory was saved with other settings of `head` or `tied`.
    """

    def __init__(
        self,
        model_dir: Path,
        max_tokens: int,
        top_k: int = TOP_K,
        head: Head = "masked_lm",
        tied: bool = True,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self._top_k = top_k
        self._head = head
        self._batch_size = batch_size
        if tied and has_encoder_each(model_dir):
            raise ConfigError(
                f"{model_dir} was saved with separate encoders for questions and passages; load "
                "it with tied False"
            )
        names = (_SHARED,) if tied else ROLES
        places = {name: model_dir / name for name in names}
        if not has_encoder_each(model_dir):
            places = dict.fromkeys(names, model_dir)
        self.vocabulary = Vocabulary(places[names[0]], max_tokens)
        # torch types the values of a ModuleDict as any module, hence Any.
        self.models: Any = torch.nn.ModuleDict(
            {name: VocabularyModel(place, head, self.vocabulary) for name, place in places.items()}
        )
        self.register_buffer(
            "_columns", torch.from_numpy(self.vocabulary.token_ids_V), persistent=False
        )
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Dropout stays off: equal weights must give equal vectors."""
        return super().train(False)

    @property
    def size(self) -> int:
        """Length of a vector (V)."""
        return self.vocabulary.size

    @property
    def bags_identity(self) -> str:
        """What determines the bags: the tokenizer and the longest text, and no weights."""
        return self.vocabulary.identity

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def identity(self) -> EncoderIdentity:
        """What determines the vectors; its hash covers the weights as they are now."""
        settings = [self._head, self._top_k, self.vocabulary.identity]
        digest = hashlib.sha256(repr(settings).encode())
        for model in self.models.values():
            digest.update(model.settings.encode())
        for name, weights in self.named_parameters():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(weights.detach().cpu().numpy()).data)
        return EncoderIdentity(digest.hexdigest()[:16], "float32", self.max_tokens)

    def embed(self, texts: Sequence[str], role: Role) -> Embedded:
        """Sparsified vectors of the texts, shape (B, V), with gradient, and their bags."""
        vectors_BV, bags_BV = self._with_bags(self.vocabulary.tokenize(texts), role)
        return Embedded(sparsified(vectors_BV, bags_BV, self._top_k), bags_BV)

    def embed_whole(self, texts: Sequence[str], role: Role) -> Embedded:
        """The same before entries are dropped: every entry is above 0."""
        return Embedded(*self._with_bags(self.vocabulary.tokenize(texts), role))

    def kept(self, vectors_BV: torch.Tensor, bags_BV: torch.Tensor) -> torch.Tensor:
        """Which entries of whole vectors `embed` keeps, bool of shape (B, V)."""
        return kept_entries(vectors_BV, bags_BV, self._top_k)

    def encode(self, texts: Sequence[str], role: Role) -> csr_array:
        """Sparsified vectors of the texts, float32 of shape (B, V), without gradient.

        Texts are sorted by length before they are cut into batches.

        Raises:
            DataError: naming the first text whose vector is not finite.
        """
        token_ids = self.vocabulary.tokenize(texts)
        order = sorted(range(len(texts)), key=lambda text: len(token_ids[text]))
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0))] * len(texts)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            entries = self._entries([token_ids[text] for text in batch], role)
            for text, (columns, values) in zip(batch, entries, strict=True):
                if not np.isfinite(values).all():
                    raise DataError(
                        f"the vector of {texts[text][:80]!r} is not finite because training made "
                        "the weights overflow float32; use the weights of an earlier step"
                    )
                found[text] = columns, values
        starts = np.cumsum([0, *(len(columns) for columns, _ in found)])
        if not found:
            return csr_array((0, self.size), dtype=np.float32)
        columns = np.concatenate([columns for columns, _ in found]).astype(np.int32)
        values = np.concatenate([values for _, values in found]).astype(np.float32)
        return csr_array((values, columns, starts), shape=(len(texts), self.size))

    def bags(self, texts: Sequence[str]) -> csr_array:
        """A 1 for every token of each text, float32 of shape (B, V); no weights are used."""
        return self.vocabulary.bags(self.vocabulary.tokenize(texts))

    def save_pretrained(self, directory: Path) -> None:
        """Write weights, head and tokenizer, in a subdirectory for each role where not tied."""
        for name, model in self.models.items():
            place = directory if name == _SHARED else directory / name
            place.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(place)
            self.vocabulary.save_pretrained(place)

    def _with_bags(
        self, token_ids: Sequence[Sequence[int]], role: Role
    ) -> tuple[torch.Tensor, torch.Tensor]:
        bags_BV = torch.from_numpy(self.vocabulary.bags(token_ids).toarray()).to(self.device)
        return self._vectors(token_ids, role), bags_BV

    def _vectors(self, token_ids: Sequence[Sequence[int]], role: Role) -> torch.Tensor:
        model = self.models[_SHARED if _SHARED in self.models else role]
        ids_BT, mask_BT = (each.to(self.device) for each in self.vocabulary.padded(token_ids))
        embeddings_VD, bias_V = model.output_layer(self._columns)
        return elu1p(max_logits(model(ids_BT, mask_BT), mask_BT, embeddings_VD, bias_V))

    @torch.inference_mode()
    def _entries(
        self, token_ids: Sequence[Sequence[int]], role: Role
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Columns, ascending, and values of the entries that are kept of each text."""
        vectors_BV, bags_BV = self._with_bags(token_ids, role)
        kept_BV = self.kept(vectors_BV, bags_BV)
        for vector_V, kept_V in zip(vectors_BV, kept_BV, strict=True):
            columns = kept_V.nonzero().squeeze(1)
            yield columns.cpu().numpy(), vector_V[columns].cpu().numpy()
