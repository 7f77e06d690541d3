"""Configuration sections of the pipeline: data, retrieval, selector, generator, reward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rlrag.errors import nearest_name
from rlrag.openai_api import DEFAULT_KEY_VARIABLE, check_address

BUILTIN_GENERATOR = "smollm2-135m-instruct"
BUILTIN_ENCODER = "all-minilm-l6-v2"
BUILTIN_VOCABULARY_ENCODER = "splade-tiny"
BETTER_GENERATOR = "gemma-3-270m"
BUILTIN_MODELS = {
    BUILTIN_GENERATOR: "demo",
    BUILTIN_ENCODER: "demo",
    BUILTIN_VOCABULARY_ENCODER: "demo",
    BETTER_GENERATOR: "gemma",
}
"""Each built-in model, and the extra whose packages bring it."""
BUILTIN_CORPUS = "factbook"

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _check_variable(name: str, field: str) -> None:
    if not _VARIABLE.fullmatch(name):  # it may be the key itself
        raise ValueError(
            f"{field} is no name of an environment variable; put the key into one, and give its "
            f"name, as {DEFAULT_KEY_VARIABLE}"
        )


Placement = Literal["pack", "spread", "strict_pack", "strict_spread"]
"""Strategies of Ray's placement groups."""


class Section(BaseModel):
    """Frozen values; unknown names, NaN and infinity are refused; docstrings become help texts."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def known_or_own(field: str, names: Sequence[str]) -> AfterValidator:
    """Takes for this field one of these names, or `package.module:name` of one's own part."""

    def check(value: str) -> str:
        if value not in names and ":" not in value:
            hint = nearest_name(value, names, f"there are: {', '.join(names)}")
            raise ValueError(
                f"{field} {value!r} is unknown; {hint} (one of your own is package.module:name)"
            )
        return value

    return AfterValidator(check)


def check_options(field: str, name: str, options: Sequence[str]) -> None:
    """Refuse options beside the name of a built-in part.

    Raises:
        ValueError: naming both.
    """
    if options and ":" not in name:
        raise ValueError(
            f"{field.partition('.')[0]}.options are for a part of your own, but {field} is "
            f"{name!r}; leave them out"
        )


BACKENDS = ("auto", "vllm", "transformers", "endpoint")
RETRIEVERS = ("bm25", "dense", "hybrid", "semi_parametric")
SELECTION, HOPS = "rlrag/DocumentSelection-v1", "rlrag/DocumentHops-v1"
"""The environments of this package."""
EdgeName = Literal["title_out", "title_in", "document", "shared", "linked", "own"]
EDGES: tuple[EdgeName, ...] = get_args(EdgeName)
"""Kinds of edges of a passage graph, in the order of `rlrag.retrieval.graph.EdgeKind`."""
SLOT_SELECTORS = ("slots", "slot_vectors", "slot_texts")
SELECTORS = ("features", "bi_encoder", "cross_encoder", "listwise_lm", *SLOT_SELECTORS)


class DataConfig(Section):
    """Where passages and questions come from."""

    corpus: str | None = BUILTIN_CORPUS
    """`factbook`, a FlashRAG JSONL file, a BEIR folder, or `hub:ID[:SUBSET]`; plain or gzip. None
    where a retriever of your own brings all passages with their texts."""
    train_questions: str = f"{BUILTIN_CORPUS}:train"
    """Questions to train on, in any of the same forms; built in are `factbook:train` and, with two
    hops, `factbook-hops:train`."""
    eval_questions: str = f"{BUILTIN_CORPUS}:test"
    """Questions of the final evaluation, none of which may be trained on."""
    max_train_questions: int | None = Field(default=None, ge=1)
    """Use a sample of this many training questions, the same for every `seed`; all when unset."""
    max_eval_questions: int | None = Field(default=None, ge=1)
    """Use a sample of this many evaluation questions, the same for every `seed`; all when unset."""
    num_validation_questions: int = Field(default=100, ge=0)
    """Training questions held out to choose the best checkpoint; 0 keeps the last one."""
    passage_words: int = Field(default=100, ge=8, lt=2**31)
    """Words of a passage that are indexed and shown to the generator; what follows is cut off."""


class RetrievalConfig(Section):
    """How candidates are found."""

    kind: Annotated[str, known_or_own("retrieval.kind", RETRIEVERS)] = "hybrid"
    """Retriever that finds and ranks the candidates: bm25, dense, hybrid, semi_parametric, or
    `package.module:name` of your own. The untrained selector keeps its order."""
    options: tuple[str, ...] = ()
    """Options of a retriever of your own, each `name=value`."""
    num_candidates: int = Field(default=10, ge=1)
    """Candidates retrieved for each question (n)."""
    encoder: str | None = BUILTIN_ENCODER
    """Sentence encoder of `dense` and `hybrid`, whose vectors are also features of the selector: a
    Hugging Face id, a path or the built-in name; may be unset for the other kinds."""
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the sentence encoder. `auto`: bfloat16 where the processor supports it
    natively, else float32."""
    encoder_max_tokens: int = Field(default=160, ge=8)
    """Tokens of a passage or question that the encoder reads."""
    vocabulary_encoder: str = BUILTIN_VOCABULARY_ENCODER
    """Masked language model of `semi_parametric`: a Hugging Face id, a path or the built-in
    name."""
    vocabulary_head: Literal["masked_lm", "layer_norm"] = "masked_lm"
    """Projection of hidden states to the vocabulary: the model's own head, or a new LayerNorm as in
    VDR."""
    index: Literal["flat", "hnsw", "ivfpq"] = "flat"
    """FAISS index over the passage vectors. `flat` is exact; `hnsw` (a graph) and `ivfpq`
    (compressed vectors) are faster and may miss passages."""
    num_shards: int = Field(default=1, ge=1)
    """Shards of the passage vectors, each searched by its own Ray actor; 1 searches in the
    calling process."""
    bm25_scores: bool = False
    """Also give the selector BM25 scores where dense retrieval ranks."""
    bm25_k1: float = Field(default=0.9, gt=0)
    """BM25 term-frequency saturation."""
    bm25_b: float = Field(default=0.4, ge=0, le=1)
    """BM25 length normalisation."""

    @model_validator(mode="after")
    def _encoder_present(self) -> Self:
        check_options("retrieval.kind", self.kind, self.options)
        if self.encoder is None and self.kind in ("dense", "hybrid"):
            raise ValueError(
                f"retrieval.kind {self.kind!r} needs retrieval.encoder; name one, or use bm25 or "
                "semi_parametric"
            )
        if self.encoder is None and self.num_shards > 1:
            raise ValueError(
                f"retrieval.num_shards is {self.num_shards}, but without retrieval.encoder there "
                "are no vectors to search in parts; set it to 1"
            )
        return self


class HopSettings(Section):
    """The pool, the parts and the limits of episodes that hop and search."""

    edges: tuple[EdgeName, ...] = EDGES
    """Kinds of edges of the passage graph that a pick follows; none makes no graph."""
    edge_sources: tuple[str, ...] = ()
    """Callables `package.module:name` that bring edges of your own to the graph."""
    writers: tuple[str, ...] = ()
    """Query writers: title, text, uncovered, or `package.module:name` of your own; none makes no
    searches."""
    num_first: int | None = Field(default=None, ge=1)
    """Hits of the question in the pool at the start (n0); unset takes all candidates."""
    num_slots: int | None = Field(default=None, ge=1)
    """Passages that a pool has room for (N); unset makes room for all that can be found."""
    num_revealed: int = Field(default=5, ge=0)
    """Most neighbours that a pick reveals (b); 0 reveals none."""
    num_hits: int = Field(default=5, ge=1)
    """Hits of a search."""
    max_queries: int = Field(default=2, ge=0)
    """Most searches of an episode (Q), the question's own not counted."""
    max_turns: int | None = Field(default=None, ge=1)
    """Most picks and searches of an episode together (H); unset sets no limit but K + Q."""
    pick_cost: float = Field(default=0.0, ge=0)
    """Subtracted from the reward for each pick."""
    query_cost: float = Field(default=0.0, ge=0)
    """Subtracted from the reward for each search."""
    turn_cost: float = Field(default=0.0, ge=0)
    """Subtracted from the reward for each turn."""
    auto_stop: bool = True
    """End an episode with its K-th pick; without, the agent has to stop it."""
    require_pick: bool = False
    """Do not allow the stop before the first pick."""


class EnvironmentConfig(Section):
    """The Gymnasium environment that turns selections into rewards."""

    id: str = SELECTION
    """Gymnasium id of the environment; `module:namespace/Name-v0` for one that a module of yours
    registers."""
    num_selected: int = Field(default=1, ge=1)
    """Maximum number of passages picked in one episode (K)."""
    hops: HopSettings = HopSettings()
    """Of `rlrag/DocumentHops-v1`."""

    @property
    def looks_further(self) -> bool:
        """Whether an episode finds more than its question's candidates."""
        return self.id == HOPS or self.hops != HopSettings()

    @model_validator(mode="after")
    def _hops_are_used(self) -> Self:
        if self.id == SELECTION and self.looks_further:
            raise ValueError(
                f"environment.hops has settings, but environment.id is {SELECTION!r}, which picks "
                f"among a question's candidates alone; use {HOPS}, or leave them out"
            )
        return self


class SelectorConfig(Section):
    """The selection policy."""

    kind: Annotated[str, known_or_own("selector.kind", SELECTORS)] = "features"
    """features (small network on frozen features), bi_encoder or cross_encoder (a trained encoder
    that reads the texts), listwise_lm (a language model that writes the order, as in the DRO
    paper), or `package.module:name` of your own. For `rlrag/DocumentHops-v1`: slots (small network
    on the features of what was found), slot_vectors (the same with a learned low-rank map between
    the vectors of question and passage) or slot_texts (with a trained encoder that reads both)."""
    options: tuple[str, ...] = ()
    """Options of a policy of your own, each `name=value`."""
    may_stop: bool = False
    """Let the policy end an episode with fewer passages; not for `listwise_lm`."""
    prior_scale: float = Field(default=0.5, gt=0)
    """Decrease of the logit per retriever rank before training; larger means less exploration."""
    model: str = BUILTIN_ENCODER
    """Encoder that `bi_encoder`, `cross_encoder` and `slot_texts` start from, or the causal
    language model of `listwise_lm`."""
    max_tokens: int = Field(default=160, ge=8)
    """Tokens of a text that a trained encoder reads; of one passage for `listwise_lm`."""
    adapter_rank: int | None = Field(default=16, ge=1)
    """Rank of the LoRA adapter that `listwise_lm` trains; unset trains all its weights."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the forward pass of `listwise_lm`; weights and updates stay in float32."""
    weights: str | None = None
    """File of a trained selector of the same kind to start from (`bundle/selector.safetensors`)."""
    imitation_steps: int = Field(default=0, ge=0)
    """Steps of supervised training before the first E-step, on orders sampled around the
    retriever's (see `prior_scale`), so that `listwise_lm` starts as a ranker; 0 does none."""
    imitation_run: str | None = None
    """TREC run file, plain or gzip, to imitate instead of the retriever's order, which completes
    rankings that are too short."""

    @property
    def reads_texts(self) -> bool:
        """Whether `model` is used: by the built-in policies that read texts."""
        return self.kind in ("bi_encoder", "cross_encoder", "listwise_lm", "slot_texts")

    @model_validator(mode="after")
    def _imitation_fits(self) -> Self:
        check_options("selector.kind", self.kind, self.options)
        if self.may_stop and ":" in self.kind:
            raise ValueError(
                "selector.may_stop is True, but a policy of your own decides itself when it stops; "
                "set it to False"
            )
        if self.imitation_steps and self.kind != "listwise_lm":
            raise ValueError(
                f"selector.imitation_steps is {self.imitation_steps}, but selector.kind "
                f"{self.kind!r} starts from the retriever's order by itself; set it to 0"
            )
        if self.may_stop and self.kind == "listwise_lm":
            raise ValueError(
                "selector.may_stop is True, but selector.kind 'listwise_lm' writes whole rankings; "
                "use another kind, or set it to False"
            )
        if self.imitation_run is not None and not self.imitation_steps:
            raise ValueError(
                f"selector.imitation_run is {self.imitation_run!r}, but selector.imitation_steps "
                "is 0, so that nothing is imitated; set the steps, or leave the run out"
            )
        return self


class FewShotExample(Section):
    """One worked example shown before the question."""

    title: str
    """Title of the example's passage."""
    text: str
    """Text of the example's passage."""
    question: str
    """The example's question."""
    answer: str
    """The example's answer."""


class PromptConfig(Section):
    """How question and passages become a prompt."""

    style: Literal["plain", "chat"] = "plain"
    """`plain` continues a text (few-shot); `chat` wraps it in the tokenizer's chat template."""
    instruction: str = "Answer the question with a few words copied from the passage.\n\n"
    """Text before the examples; the system message of a chat."""
    passage_template: str = "[{number}] {title}: {text}\n"
    """One passage; fields: number, title, text."""
    passage_order: Literal["as_picked", "best_last"] = "as_picked"
    """Order of the passages in the prompt. `best_last` puts the first pick last, next to the
    question, which small models read best. Affects only the prompt."""
    question_template: str = "Question: {question}\nAnswer:"
    """Text after the passages; field: question. The answer follows after one space."""
    few_shot: tuple[FewShotExample, ...] = ()
    """Worked examples before the question."""
    max_prompt_tokens: int = Field(default=1024, ge=16)
    """Longest prompt; passages are truncated, the longest first, until it fits. The question never
    is."""


class GeneratorConfig(Section):
    """The language model that answers, and the actors that run it."""

    model: str = BUILTIN_GENERATOR
    """Causal language model: a built-in name, a Hugging Face id or a path. With an endpoint, or a
    generator of your own, only its tokenizer is used, to build the prompts."""
    backend: Annotated[str, known_or_own("generator.backend", BACKENDS)] = "auto"
    """auto (vLLM under the ray launcher, transformers under the local one), vllm, transformers,
    endpoint (an OpenAI-compatible server, which is started and stopped by somebody else), or
    `package.module:name` of a generator of your own."""
    options: tuple[str, ...] = ()
    """Options of a generator of your own, each `name=value`."""
    url: str | None = None
    """Base URL of the endpoint's API, such as `http://127.0.0.1:8000/v1`."""
    served_model: str | None = None
    """Name of the model on the endpoint; `generator.model` when unset."""
    key_variable: str = DEFAULT_KEY_VARIABLE
    """Environment variable that holds the endpoint's API key; not needed where the endpoint asks
    for none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the model. `auto`: bfloat16 where the device supports it natively, else
    float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that the model runs on. `auto`: a GPU if torch finds one, else the CPU."""
    num_actors: int = Field(default=2, ge=1)
    """Ray actors, each with its own engine."""
    cpus_per_actor: float = Field(default=0.5, gt=0)
    """Ray CPU reservation of an actor."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """Ray GPU reservation of an actor."""
    placement: Placement | None = None
    """Ray placement strategy of the actors: `pack` on few nodes, `spread` over many, `strict_pack`
    on one, `strict_spread` one each; resources are then reserved for all actors at once. Unset
    places each actor where there is room."""
    tensor_parallel: int = Field(default=1, ge=1)
    """Tensor parallelism of a vLLM engine: GPUs, or processes on a CPU; must divide the number of
    attention heads."""
    threads_per_actor: int = Field(default=1, ge=1)
    """Compute threads of an actor's engine on a CPU."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences in one forward pass (transformers) or in flight (vLLM, endpoint)."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """Size of the key-value cache of a vLLM engine on a CPU."""
    max_model_len: int = Field(default=2048, ge=32)
    """Maximum number of prompt and answer tokens together."""
    max_new_tokens: int = Field(default=12, ge=1)
    """Maximum number of answer tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 decodes greedily."""
    stop: tuple[str, ...] = ("\n",)
    """Stop strings; the answer ends before the first of them."""
    request_timeout_s: float = Field(default=300, gt=0)
    """Time limit for one batch of one actor, or for one answer of an endpoint, retries
    included."""
    start_timeout_s: float = Field(default=300, gt=0)
    """Time limit for an actor to load its model."""
    prompt: PromptConfig = PromptConfig()
    """The prompt."""

    @model_validator(mode="after")
    def _backend_fits(self) -> Self:
        check_options("generator.backend", self.backend, self.options)
        if self.is_remote and self.url is None:
            raise ValueError(
                "generator.backend 'endpoint' asks a server, but generator.url is unset; set it, "
                "as http://127.0.0.1:8000/v1"
            )
        for field in ("url", "served_model"):
            if getattr(self, field) is not None and not self.is_remote:
                raise ValueError(
                    f"generator.{field} names what a server has, but generator.backend is "
                    f"{self.backend!r}; set it to endpoint, or leave {field} out"
                )
        if self.url is not None:
            check_address(self.url, "generator.url")
        _check_variable(self.key_variable, "generator.key_variable")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether a server answers, which has the model's weights to itself."""
        return self.backend == "endpoint"

    @property
    def is_own(self) -> bool:
        """Whether a generator of somebody's own answers, and not a model that is loaded here."""
        return ":" in self.backend

    @property
    def answering_model(self) -> str:
        """The name of the model that answers."""
        return self.backend if self.is_own else self.served_model or self.model

    def with_model(self, model: str) -> GeneratorConfig:
        """The same with another model, which a built-in back end loads."""
        changes: dict[str, object] = {"model": model}
        if self.is_remote or self.is_own:
            changes |= {"backend": "auto", "options": (), "url": None, "served_model": None}
        return self.model_copy(update=changes)


_BY_GOLDEN_ANSWERS = frozenset(
    {"answer_logp", "answer_logp_mean", "exact_match", "token_f1", "answer_contained", "rouge_l"}
)


class JudgeConfig(Section):
    """The server whose language model the reward `judge` asks whether an answer is correct."""

    url: str | None = None
    """Base URL of the judge's OpenAI-compatible API, such as `http://127.0.0.1:8000/v1`."""
    model: str | None = None
    """Name of the judge's model on that server."""
    key_variable: str = DEFAULT_KEY_VARIABLE
    """Environment variable that holds the judge's API key; not needed where the server asks for
    none."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.url is None) != (self.model is None):
            unset = "url" if self.url is None else "model"
            raise ValueError(f"reward.judge.{unset} is unset; set url and model, or neither")
        if self.url is not None:
            check_address(self.url, "reward.judge.url")
        _check_variable(self.key_variable, "reward.judge.key_variable")
        return self


class RewardConfig(Section):
    """What an answer is worth."""

    functions: tuple[str, ...] = ("answer_logp",)
    """Reward functions: built-in names or `package.module:function`. The reward is their weighted
    sum."""
    weights: tuple[float, ...] = (1.0,)
    """One weight per function; a term of weight 0 is logged but not trained on."""
    golden_answers: Literal["likeliest", "all"] = "likeliest"
    """How several golden answers count. `likeliest`: `answer_logp` is that of the likeliest answer,
    and the generator learns the first. `all`: `answer_logp` is the log of their summed likelihoods,
    and a generator trained by DRO learns each, weighted by its share of the sum."""
    judge: JudgeConfig = JudgeConfig()
    """The language model that the reward `judge` asks."""
    timeout_s: float = Field(default=30, gt=0)
    """Time limit of one call of a custom function, or of one reply of the judge."""
    max_concurrent: int = Field(default=8, ge=1)
    """Concurrent calls of a custom function, or requests to the judge; set 1 if the function is not
    thread-safe."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if len(self.functions) != len(self.weights):
            raise ValueError(
                f"reward.functions has {len(self.functions)} entries and reward.weights "
                f"{len(self.weights)}; give one weight a function"
            )
        if ("judge" in self.functions) != (self.judge.url is not None):
            raise ValueError(
                "reward.functions and reward.judge belong together: name 'judge' among the "
                "functions, and set reward.judge.url and reward.judge.model, or leave out all three"
            )
        if self.golden_answers == "all" and "answer_logp_mean" in self.functions:
            raise ValueError(
                "reward.golden_answers 'all' sums over answers, of which answer_logp_mean would "
                "divide by the tokens of one; use answer_logp, or golden_answers 'likeliest'"
            )
        if not any(self.weights):
            raise ValueError("reward.weights are all zero; at least one term must count")
        return self

    @property
    def needs_golden_answers(self) -> bool:
        """Whether a built-in term compares with golden answers or scores them.

        Without one, scoring fails whatever its weight; a comparison that does not count may give
        what it likes.
        """
        counted = zip(self.functions, self.weights, strict=True)
        return any(
            name in {*_BY_GOLDEN_ANSWERS, "judge"}
            and (weight != 0 or name.startswith("answer_logp"))
            for name, weight in counted
        )

    @property
    def follows_golden_answers(self) -> bool:
        """Whether it says how well answers agree with golden ones, as exact match and F1 do.

        Quality is then measured by these; any other reward, such as a judge's, is what quality
        means.
        """
        counted = zip(self.functions, self.weights, strict=True)
        return all(
            weight >= 0 and (name in _BY_GOLDEN_ANSWERS or not weight) for name, weight in counted
        )
