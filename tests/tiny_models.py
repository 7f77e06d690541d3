"""A directory in; a random language model or text encoder that loads like a real one out.

All are seeded, have a tokenizer that was trained on the built-in sample, and answer in
milliseconds on one core.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rlrag.data.sample import sample_corpus, sample_questions

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
NUM_TOKENS = 600


def _sample_texts() -> list[str]:
    passages = [f"{passage.title} {passage.text}" for passage in sample_corpus()]
    return passages + [f"Question: {q.question}\nAnswer:" for q in sample_questions()]


def save_tokenizer(directory: Path) -> Any:
    """A byte-level BPE tokenizer, trained on the sample; returns it too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=[END, PAD, UNKNOWN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(_sample_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=END,
        sep_token=END,
        model_max_length=2048,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_tiny_llama(directory: Path, seed: int = 0) -> Path:
    """A Llama with two layers and random weights, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(directory)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,  # peaked distributions, so that greedy choices are no ties
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "qwen2_moe")
"""Kinds of causal language models that differ in what they tie, cap, window, norm or mix."""


def save_family(directory: Path, family: str) -> Path:
    """A random model of a family with two layers, its weights large, with its tokenizer.

    Heads have 32 numbers, the fewest that vLLM takes on a CPU.
    """
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(directory)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    special: dict[str, dict[str, Any]] = {
        "gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": 64},
        "gemma3_text": {"sliding_window": 16},
        "qwen2_moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        "gpt_neox": {"hidden_size": 64},
    }
    kind = "gemma3_text" if family == "gemma3" else family
    options |= special.get(kind, {})
    if family in ("gpt2", "gpt_neox", "qwen2_moe"):
        options |= {"hidden_size": 64}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def save_tiny_encoder(directory: Path, seed: int = 0) -> Path:
    """A sentence-transformers directory: a BERT with two layers and random weights, mean-pooled."""
    import torch
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    backbone = directory.with_name(f"{directory.name}-backbone")
    backbone.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(backbone)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertModel(config).save_pretrained(backbone)
    words = models.Transformer(str(backbone), max_seq_length=256)
    pooling = models.Pooling(words.get_embedding_dimension())
    SentenceTransformer(modules=[words, pooling], device="cpu").save(str(directory))
    return directory


def save_word_pieces(directory: Path, num_tokens: int = NUM_TOKENS) -> Any:
    """A WordPiece tokenizer like BERT's, with the sample's most frequent words; returns it too.

    Its vocabulary is counted here, as the library's trainer orders equal counts differently each
    time.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(
        word
        for text in _sample_texts()
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    special = ["[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused2]"]
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(
        (word for word in words if len(word) > 1), key=lambda word: (-words[word], word)
    )
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *frequent][:num_tokens]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizer, splitter
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, raw.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=128,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def save_tiny_masked_lm(directory: Path, seed: int = 0) -> Path:
    """A BERT with two layers, its masked-LM head and random weights, with its tokenizer."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = save_word_pieces(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # vectors of different texts differ, so that rankings are no ties
    )
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(directory)
    return directory


def save_vllm_llama(directory: Path, tied: bool = False) -> Path:
    """A random Llama with heads of 32 numbers, the fewest that vLLM takes on a CPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(exist_ok=True)
    tokenizer = save_tokenizer(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
