"""Loads a masked language model: hidden states and output layer.

The model is transformers' own; its output layer is told to hand on what it gets, so that the
logits, one number for every position and word piece, are never computed for a whole batch. That
this gives the model's logits is tried out when it is loaded.

Shape letters: B texts, T positions, D hidden size, V columns of vocabulary space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlrag.errors import ConfigError
from rlrag.files.directories import load_tensors, save_weights
from rlrag.retrieval.vocabulary.tokens import Vocabulary, check_max_tokens

NORM_FILE = "vocabulary_norm.safetensors"
# Embeddings are often padded to a multiple of 64 or 128 rows; more of them than that belong to
# another tokenizer.
_MAX_SPARE_EMBEDDINGS = 128
_PROBE = "a text that tries the head"
# Of the configuration: what says where it was saved and how, not what the model computes.
_RECORDS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


class VocabularyModel(torch.nn.Module):
    """Token ids to hidden states that the word embeddings turn into logits.

    Args:
        model_dir: Directory of the model.
        head: `masked_lm` or `layer_norm`, as in `VocabularyEncoder`.
        vocabulary: The tokenizer that lies beside the model.

    Raises:
        ConfigError: when this is no masked language model with its own head, or the tokenizer does
            not fit it.
    """

    def __init__(self, model_dir: Path, head: str, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.masked_lm: Any = _load(model_dir)
        limit = getattr(self.masked_lm.config, "max_position_embeddings", None)
        check_max_tokens(vocabulary.max_tokens, limit, model_dir)
        _check_tokenizer(self.masked_lm, vocabulary, model_dir)
        self.masked_lm.eval()
        self.norm: torch.nn.LayerNorm | None = None
        if head == "layer_norm":
            self.norm = _load_norm(self.masked_lm, model_dir)
            _freeze_head(self.masked_lm)
            return
        if (model_dir / NORM_FILE).exists():
            raise ConfigError(
                f"{model_dir} was saved with a LayerNorm before the vocabulary; set "
                "retrieval.vocabulary_head to layer_norm"
            )
        self._bypass_output_layer(model_dir, vocabulary)

    @property
    def settings(self) -> str:
        """What the model computes besides its weights, as canonical JSON."""
        found = self.masked_lm.config.to_diff_dict()
        found = {name: value for name, value in found.items() if name not in _RECORDS}
        return json.dumps(found, sort_keys=True, default=str)

    def forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states before the output layer, shape (B, T, D)."""
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT.long()}
        if self.norm is None:
            return self.masked_lm(**inputs).logits
        return self.norm(self.masked_lm.base_model(**inputs)[0])

    def output_layer(self, token_ids_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings (V, D) of the given tokens and, where the head has one, their bias (V)."""
        if self.norm is not None:
            return self.masked_lm.get_input_embeddings().weight[token_ids_V], None
        decoder = self.masked_lm.get_output_embeddings()
        bias = getattr(decoder, "bias", None)
        return decoder.weight[token_ids_V], None if bias is None else bias[token_ids_V]

    def save_pretrained(self, directory: Path) -> None:
        """Write the model's files, and the LayerNorm's where there is one."""
        self.masked_lm.save_pretrained(directory)
        if self.norm is not None:
            save_weights(self.norm, directory / NORM_FILE)

    def _bypass_output_layer(self, model_dir: Path, vocabulary: Vocabulary) -> None:
        """Let the output layer hand on its input, and check that nothing comes after it."""
        decoder = self.masked_lm.get_output_embeddings()
        if getattr(decoder, "weight", None) is None:
            raise ConfigError(_unusable_head(model_dir, "it has no output layer with a weight"))
        ids_BT, mask_BT = vocabulary.padded(vocabulary.tokenize([_PROBE]))
        columns_V = torch.from_numpy(vocabulary.token_ids_V)
        with torch.inference_mode():
            expected_BTV = self(ids_BT, mask_BT)[..., columns_V]
            # On the instance: weights, their names and the ties between them stay as they are.
            vars(decoder)["forward"] = _hand_on
            hidden_BTD = self(ids_BT, mask_BT)
            weight_VD, bias_V = self.output_layer(columns_V)
            if hidden_BTD.shape[-1] != weight_VD.shape[-1]:
                raise ConfigError(
                    _unusable_head(model_dir, "its output layer is not the last step")
                )
            logits_BTV = torch.nn.functional.linear(hidden_BTD, weight_VD, bias_V)
        if not torch.allclose(logits_BTV, expected_BTV, rtol=1e-3, atol=1e-3):
            raise ConfigError(_unusable_head(model_dir, "its logits are not H E^T + bias"))


def _hand_on(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _load(model_dir: Path) -> Any:
    from transformers import AutoModelForMaskedLM

    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            model_dir,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{model_dir} has no masked language model that transformers can load ({error}); set "
            "retrieval.vocabulary_encoder to another model"
        ) from error
    # transformers draws what it does not find at random.
    missing = sorted(report["missing_keys"])
    if missing:
        raise ConfigError(
            f"{model_dir} is missing the weights {', '.join(missing[:5])}; set "
            "retrieval.vocabulary_encoder to a masked language model with its prediction head"
        )
    return model


def _check_tokenizer(masked_lm: Any, vocabulary: Vocabulary, model_dir: Path) -> None:
    num_embeddings = len(masked_lm.get_input_embeddings().weight)
    spare = num_embeddings - vocabulary.num_tokens
    if not 0 <= spare < _MAX_SPARE_EMBEDDINGS:
        raise ConfigError(
            f"the tokenizer in {model_dir} has {vocabulary.num_tokens} tokens, but the model has "
            f"{num_embeddings} word embeddings; use the tokenizer that the model was trained with"
        )


def _load_norm(masked_lm: Any, model_dir: Path) -> torch.nn.LayerNorm:
    size = masked_lm.config.hidden_size
    embedding_size = masked_lm.get_input_embeddings().weight.shape[1]
    if size != embedding_size:
        raise ConfigError(
            f"the hidden states of {model_dir} have {size} numbers, its word embeddings "
            f"{embedding_size}; set retrieval.vocabulary_head to masked_lm"
        )
    norm = torch.nn.LayerNorm(size)
    if (model_dir / NORM_FILE).exists():
        tensors = load_tensors(model_dir / NORM_FILE)
        try:
            norm.load_state_dict(tensors)
        except RuntimeError as error:
            raise ConfigError(
                f"{model_dir / NORM_FILE} does not fit its model: {error}; save the encoder again"
            ) from error
    return norm


def _freeze_head(masked_lm: Any) -> None:
    """The model's own head is not used, so a trainer must not wait for its gradients."""
    used = {id(weights) for weights in masked_lm.base_model.parameters()}
    for weights in masked_lm.parameters():
        if id(weights) not in used:
            weights.requires_grad_(False)


def _unusable_head(model_dir: Path, reason: str) -> str:
    return (
        f"the prediction head of {model_dir} cannot be used ({reason}); set "
        "retrieval.vocabulary_head to layer_norm, or name another model in "
        "retrieval.vocabulary_encoder"
    )
