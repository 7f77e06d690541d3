"""Loads causal language models and refuses those that cannot read a prompt in parts.

Selector, generator and learner read what many prompts begin with once and keep its keys and values.
A model that keeps something else, or that sees what follows a token, would give other numbers
without a word, so each of them opens its model here.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlrag.errors import ConfigError, GenerationError

# Nats a token by which two ways to compute one log-probability differ at most, by number format.
_ROUNDING = {"float32": 5e-3, "float16": 0.1, "bfloat16": 0.4}


def load_causal_lm(
    model_dir: Path, dtype: torch.dtype, advice: str, attention: str | None = None
) -> Any:
    """The model on the CPU, all its dropout rates zero.

    Args:
        model_dir: Directory that transformers can load.
        dtype: Number format of the weights.
        advice: What to do where the model is refused.
        attention: The implementation that is wanted; `attention_for` may know better.

    Raises:
        ConfigError: when the model is of no kind that can be read in parts.
        GenerationError: when transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
        check_causal(config, model_dir, advice)
        for name, value in config.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        chosen = attention_for(config, attention)
        return AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            **({"attn_implementation": chosen} if chosen else {}),
        )
    except ConfigError:
        raise
    except Exception as error:  # what model code raises is anything
        raise GenerationError(
            f"transformers cannot load the model in {model_dir}: {type(error).__name__}: {error}"
        ) from error


def attention_for(config: Any, wanted: str | None = None) -> str | None:
    """The implementation of attention that computes what the configuration says.

    Only `eager` caps the logits of attention, as Gemma 2 has it; transformers (5.19) lets the
    others leave the cap out.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else wanted


def check_causal(config: Any, model_dir: Path, advice: str) -> None:
    """Refuse by its configuration what cannot be read in parts.

    An encoder, which transformers loads too, sees what is still to be written; a layer with a state
    takes in every token that was read.

    Raises:
        ConfigError: with the reason and the advice.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    # BERT reads both ways unless it is told to be a decoder; GPT-NeoX has the same switch idle.
    reads_both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    is_encoder = reads_both_ways and not getattr(config, "is_decoder", False)
    if is_encoder or not known.intersection(config.architectures or ()):
        raise ConfigError(
            f"{model_dir} contains {config.architectures}, which is not a causal language model; "
            f"{advice}"
        )
    if keeps_states(config):
        raise ConfigError(
            f"the model in {model_dir} has recurrent layers instead of a key-value cache, which "
            f"padding would corrupt and prompts cannot share; {advice}"
        )


def keeps_states(config: Any) -> bool:
    """Whether some layer of a causal language model keeps a state in place of keys and values.

    Such a state takes in every token that was read, so that neither padding nor another branch of a
    prompt can be kept from it.

    Args:
        config: The model's, as transformers loads it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if getattr(model_class, "_is_stateful", False):
            return True
    layers = DynamicCache(config=config).layers
    return any(hasattr(layer, "update_conv_state") for layer in layers)


def has_windows(config: Any) -> bool:
    """Whether some layer sees the last columns of its cache only."""
    from transformers import DynamicCache

    # GPT-Neo's window is one that transformers' cache does not know.
    is_local = "local" in (getattr(config, "attention_layers", None) or ())
    return is_local or any(DynamicCache(config=config).is_sliding)


@torch.no_grad()
def check_prefix_reading(model: Any, model_dir: Path, advice: str) -> None:
    """Compare an answer behind a prefix that was read before with a plain forward pass.

    Raises:
        ConfigError: when they differ by more than rounding, or a prefix cannot be read apart.
    """
    prefix, answer = (tokens := probe_tokens(model, 24))[:16], tokens[16:]
    device = next(model.parameters()).device
    try:
        read = model(input_ids=torch.tensor([prefix[:-1]], device=device), use_cache=True)
        past = read.past_key_values
        past.batch_repeat_interleave(1)
        rest_1T = torch.tensor([(prefix + answer)[15:-1]], device=device)
        logits_TV = model(input_ids=rest_1T, past_key_values=past, use_cache=True).logits[0]
        _compare(_sum_logp(logits_TV, answer), model, prefix, answer, "behind a prefix")
    except Exception as error:  # what model code raises is anything
        raise _misread(error, model_dir, "go on from the keys and values", advice) from error


def check_batches(
    model: Any,
    score: Callable[[list[tuple[int, ...]], tuple[int, ...]], float],
    prefix: tuple[int, ...],
    max_len: int | None,
    model_dir: Path,
    advice: str,
) -> None:
    """Compare an answer to the first of two prompts, which is padded, with a plain forward pass.

    Args:
        model: What scores.
        score: Takes a batch of prompts, and an answer to the first of them; gives its log p.
        prefix: What both prompts begin with.
        max_len: Tokens that prompt and answer may have.
        model_dir: Where the model is from.
        advice: What to do where it is refused.

    Raises:
        ConfigError: when they differ by more than rounding, or the batch cannot be read.
    """
    number = min(36, (max_len or len(prefix) + 36) - len(prefix))
    if number < 6:  # no prompt of any use fits behind the prefix
        return
    tokens = probe_tokens(model, number)
    answer, short, long = tokens[:3], prefix + tokens[3:5], prefix + tokens[3:]
    where = "in a padded batch" + (" behind a shared prefix" if prefix else "")
    try:
        _compare(score([short, long], answer), model, short, answer, where)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what model code raises is anything
        raise _misread(error, model_dir, f"be read {where}", advice) from error


def probe_tokens(model: Any, number: int) -> tuple[int, ...]:
    """Token ids from all over a model's vocabulary, the same every time."""
    size = model.get_input_embeddings().weight.shape[0]
    return tuple((7919 * (i + 1)) % size for i in range(number))


def differ(found: float, expected: float, num_tokens: int, *dtypes: torch.dtype) -> bool:
    """Whether two log-probabilities of an answer differ by more than rounding; NaN always does.

    Args:
        found: In nats.
        expected: In nats, of the same answer, computed another way.
        num_tokens: Of the answer.
        dtypes: The number formats that they were computed in.

    Example:
        >>> differ(-3.0, -3.001, 1, torch.float32), differ(-3.0, -3.1, 1, torch.float32)
        (False, True)
        >>> differ(-3.0, -3.1, 1, torch.float32, torch.bfloat16)
        False
    """
    rounding = max(_ROUNDING[str(dtype).removeprefix("torch.")] for dtype in dtypes)
    return not abs(found - expected) <= rounding * num_tokens


def _compare(
    found: float, model: Any, prompt: tuple[int, ...], answer: tuple[int, ...], where: str
) -> None:
    """Raise where a log-probability is not the one of a plain forward pass."""
    tokens_1T = torch.tensor([prompt + answer], device=next(model.parameters()).device)
    logits_TV = model(input_ids=tokens_1T, use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = _sum_logp(logits_TV, answer)
    if differ(found, expected, len(answer), model.dtype):
        raise ValueError(
            f"log p of {len(answer)} tokens is {found:.4f} {where} and {expected:.4f} in a plain "
            "forward pass"
        )


def _sum_logp(logits_TV: torch.Tensor, answer: tuple[int, ...]) -> float:
    logp_TV = logits_TV.float().log_softmax(dim=-1)
    return sum(float(logp_TV[t, token]) for t, token in enumerate(answer))


def _misread(error: Exception, model_dir: Path, what: str, advice: str) -> ConfigError:
    reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return ConfigError(f"the model in {model_dir} cannot {what}: {reason}; {advice}")
