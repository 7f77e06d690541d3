"""`RunConfig`: all sections of a run, to and from JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from rlrag.config.algorithm import (
    Algorithm,
    AlternatingConfig,
    DROConfig,
    FeedbackConfig,
    JSAConfig,
    OpenRAGConfig,
    OwnTrainerConfig,
    SFTConfig,
)
from rlrag.config.fixed import without_fixed
from rlrag.config.renamed import with_algorithm
from rlrag.config.sections import (
    HOPS,
    RETRIEVERS,
    SELECTION,
    SELECTORS,
    SLOT_SELECTORS,
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    RetrievalConfig,
    RewardConfig,
    Section,
    SelectorConfig,
)
from rlrag.config.training import (
    EvaluationConfig,
    GeneratorTrainingConfig,
    MirrorConfig,
    System,
    TrainingConfig,
)
from rlrag.config.validation_errors import describe
from rlrag.errors import ConfigError


class RunConfig(Section):
    """One run, completely."""

    recipe: str = "custom"
    """Name of the recipe."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """All randomness of training derives from it; which questions are sampled or held back does
    not."""
    cache_dir: str = Field(default="~/.cache/rlrag", min_length=1)
    """Models, indexes, candidates and generations that runs share."""
    data: DataConfig = DataConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    selector: SelectorConfig = SelectorConfig()
    generator: GeneratorConfig = GeneratorConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: Algorithm = DROConfig()
    generator_training: GeneratorTrainingConfig = GeneratorTrainingConfig()
    training: TrainingConfig = TrainingConfig()
    mirror: MirrorConfig = MirrorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        k, n = self.environment.num_selected, self.retrieval.num_candidates
        if k > n:
            raise ValueError(
                f"environment.num_selected is {k} but retrieval.num_candidates only {n}; "
                "pick at most as many passages as are retrieved"
            )
        if self.training.batch_size < self.training.num_workers:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} leaves some of "
                f"training.num_workers {self.training.num_workers} without a question; use fewer "
                "workers"
            )
        self._check_selector()
        if self.data.corpus is None:
            self._check_no_corpus()
        self._check_systems()
        self._check_patience()
        if self.generator_training.share_base:
            self._check_shared_base()
        if self.feedback is not None and self.selector.imitation_steps:
            raise ValueError(
                f"algorithm.name 'feedback' starts from selector.weights, but "
                f"selector.imitation_steps is {self.selector.imitation_steps}; set it to 0"
            )
        if self.training.start_from is not None:
            self._check_start()
        if self.trains_retriever:
            self._check_trained_retriever()
        if self.training.launcher == "local" and self.training.num_workers != 1:
            raise ValueError(
                "training.launcher 'local' is one process; set training.num_workers to 1"
            )
        if self.training.launcher == "local" and self.retrieval.num_shards > 1:
            raise ValueError(
                "training.launcher 'local' runs without Ray, which searches shards; set "
                "retrieval.num_shards to 1"
            )
        if self.training.launcher == "local" and self.generator.backend == "vllm":
            raise ValueError(
                "training.launcher 'local' runs without vLLM; use generator.backend transformers"
            )
        if self.trains_generator and (self.generator.is_remote or self.generator.is_own):
            backend = self.generator.backend
            what = "asks a server" if self.generator.is_remote else "is a generator of your own"
            raise ValueError(
                f"algorithm.name {self.algorithm.name!r} trains the generator, but "
                f"generator.backend {backend!r} {what}, whose weights cannot be trained from here; "
                "leave the generator out, or use vllm or transformers"
            )
        by_others = isinstance(self.algorithm, SFTConfig | JSAConfig | OwnTrainerConfig)
        if self.reward.golden_answers == "all" and by_others:
            raise ValueError(
                "reward.golden_answers 'all' weighs what DRO trains on; with algorithm.name "
                f"{self.algorithm.name!r} leave it at 'likeliest'"
            )
        generator = self.generator
        if generator.max_model_len < generator.prompt.max_prompt_tokens + generator.max_new_tokens:
            raise ValueError(
                f"generator.max_model_len {generator.max_model_len} is shorter than "
                f"max_prompt_tokens {generator.prompt.max_prompt_tokens} plus max_new_tokens "
                f"{generator.max_new_tokens}"
            )
        return self

    def _check_selector(self) -> None:
        kind, environment = self.selector.kind, self.environment.id
        reads_slots = kind in SLOT_SELECTORS
        if self.dro.baseline == "prefix" and environment not in (SELECTION, HOPS):
            raise ValueError(
                "algorithm.baseline 'prefix' stops paths before each action, by the last action of "
                f"{SELECTION} and {HOPS}; with environment.id {environment!r} use mean"
            )
        if kind not in SELECTORS or environment not in (SELECTION, HOPS):
            return
        if reads_slots != (environment == HOPS):
            fitting = [name for name in SELECTORS if (name in SLOT_SELECTORS) != reads_slots]
            raise ValueError(
                f"selector.kind {kind!r} does not read what environment.id {environment!r} shows; "
                f"use one of {', '.join(fitting)}"
            )
        if reads_slots and not self.dro.replacement:
            raise ValueError(
                "algorithm.replacement False draws whole selections at once, but selector.kind "
                f"{kind!r} chooses each action by what the last one found; set it to True"
            )
        if kind == "slot_vectors" and self.retrieval.encoder is None:
            raise ValueError(
                "selector.kind 'slot_vectors' reads vectors, but retrieval.encoder is unset; name "
                "one, or use slots"
            )

    def _check_no_corpus(self) -> None:
        retrieval = self.retrieval
        searching = [n for n in self.evaluation.systems or () if n in ("bm25", "dense", "hybrid")]
        for is_there, what in (
            (retrieval.kind in RETRIEVERS, f"retrieval.kind {retrieval.kind!r} searches one"),
            (retrieval.bm25_scores, "retrieval.bm25_scores counts the words of one"),
            (retrieval.index != "flat", f"retrieval.index {retrieval.index!r} is built of one"),
            (retrieval.num_shards > 1, f"retrieval.num_shards {retrieval.num_shards} divides one"),
            (searching, f"evaluation.systems {', '.join(searching)} search one"),
            (self.feedback, "algorithm.log names passages of one by their ids"),
        ):
            if is_there:
                raise ValueError(
                    f"data.corpus is None, but {what}; name a corpus, or use a retriever of your "
                    "own that brings its passages, and nothing else that needs a corpus"
                )

    def _check_systems(self) -> None:
        asked = self.evaluation.systems or ()
        for name in ("original_retriever", "tuned_retriever"):
            if name in asked and not self.trains_retriever:
                raise ValueError(
                    f"evaluation.systems asks for {name}, but algorithm.name "
                    f"{self.algorithm.name!r} trains no retriever; leave it out"
                )
        for name in ("hop_text", "hop_title", "hop_both"):
            if name in asked and not self.environment.looks_further:
                raise ValueError(
                    f"evaluation.systems asks for {name}, which follows a passage graph, but "
                    f"environment.id {self.environment.id!r} has none; leave it out, or use {HOPS}"
                )
        for name in ("dense", "hybrid"):
            if name in asked and self.retrieval.encoder is None:
                raise ValueError(
                    f"evaluation.systems asks for {name}, but retrieval.encoder is unset; name one "
                    "or leave the system out"
                )

    def _check_patience(self) -> None:
        held_back: tuple[str, float] = (
            ("algorithm.held_back_share", self.feedback.held_back_share)
            if self.feedback is not None
            else ("data.num_validation_questions", self.data.num_validation_questions)
        )
        if self.training.patience is not None and not held_back[1]:
            raise ValueError(
                f"training.patience {self.training.patience} counts validations, but "
                f"{held_back[0]} is 0, so that there are none; hold some back, or unset it"
            )

    def _check_start(self) -> None:
        start = f"training.start_from is {self.training.start_from!r}, but"
        if self.trains_in_turns:
            raise ValueError(
                f"{start} a run in turns has no checkpoints of all parts; train one of the turns, "
                "with its parts alone"
            )
        if self.feedback is not None:
            raise ValueError(
                f"{start} algorithm.name 'feedback' starts from selector.weights; name the "
                "checkpoint's policy.safetensors there"
            )
        if self.selector.weights is not None:
            raise ValueError(
                f"{start} selector.weights {self.selector.weights!r} names weights to start from "
                "too; give one of them"
            )

    def _check_shared_base(self) -> None:
        selector, training = self.selector, self.generator_training
        if set(self.algorithm.parts) != {"selector", "generator"}:
            raise ValueError(
                "generator_training.share_base needs a run that trains selector and generator and "
                f"nothing else, but algorithm.name {self.algorithm.name!r} trains "
                f"{list(self.algorithm.parts)}; set it to False"
            )
        if selector.kind != "listwise_lm" or selector.adapter_rank is None:
            raise ValueError(
                "generator_training.share_base needs a selector with an adapter, but selector.kind "
                f"is {selector.kind!r} and selector.adapter_rank {selector.adapter_rank}; use "
                "listwise_lm with a rank"
            )
        if training.method != "lora" or training.sharding != "replicated":
            raise ValueError(
                "generator_training.share_base needs a generator whose own weights stay whole and "
                f"as they are, but generator_training.method is {training.method!r} and sharding "
                f"{training.sharding!r}; use lora and replicated"
            )
        if selector.model != self.generator.model:
            raise ValueError(
                f"generator_training.share_base needs one model, but selector.model is "
                f"{selector.model!r} and generator.model {self.generator.model!r}; name the same"
            )

    def _check_trained_retriever(self) -> None:
        retrieval, openrag = self.retrieval, self.openrag
        if retrieval.kind not in ("dense", "semi_parametric"):
            raise ValueError(
                f"algorithm.name {self.algorithm.name!r} trains the retriever, but retrieval.kind "
                f"{retrieval.kind!r} has nothing to train; use dense or semi_parametric"
            )
        if not self.trains_by_openrag:
            return
        if openrag.first_stage == "bm25" and not retrieval.bm25_scores:
            raise ValueError(
                "algorithm.first_stage 'bm25' needs a BM25 index; set retrieval.bm25_scores True"
            )
        if openrag.first_stage == "bag_of_tokens" and retrieval.kind == "dense":
            raise ValueError(
                "algorithm.first_stage 'bag_of_tokens' is searched by vectors over a vocabulary, "
                "which retrieval.kind 'dense' has not; use frozen or bm25"
            )
        if openrag.vectors == "one_whole" and retrieval.kind == "dense":
            raise ValueError(
                "algorithm.vectors 'one_whole' is for semi_parametric; vectors of a dense encoder "
                "are whole"
            )
        if not openrag.tied and retrieval.kind == "dense":
            raise ValueError(
                "algorithm.tied False is for semi_parametric; a dense encoder reads questions and "
                "passages alike"
            )
        if openrag.num_online < self.environment.num_selected:
            raise ValueError(
                f"algorithm.num_online {openrag.num_online} finds fewer passages than "
                f"environment.num_selected {self.environment.num_selected} shows"
            )

    @property
    def dro(self) -> DROConfig:
        """How selections are drawn and weighted; the defaults where the algorithm does not say.

        Fine-tuning takes one selection a question.
        """
        if isinstance(self.algorithm, AlternatingConfig):
            return self.algorithm.selection
        if isinstance(self.algorithm, SFTConfig):
            return DROConfig(parts=("generator",), num_samples=1)
        return self.algorithm if isinstance(self.algorithm, DROConfig) else DROConfig()

    @property
    def openrag(self) -> OpenRAGConfig:
        """How OpenRAG trains the retriever; the defaults where the algorithm does not say."""
        if isinstance(self.algorithm, AlternatingConfig):
            return self.algorithm.retriever
        return self.algorithm if isinstance(self.algorithm, OpenRAGConfig) else OpenRAGConfig()

    @property
    def jsa(self) -> JSAConfig:
        """How JSA trains; the defaults where the algorithm does not say."""
        return self.algorithm if isinstance(self.algorithm, JSAConfig) else JSAConfig()

    @property
    def feedback(self) -> FeedbackConfig | None:
        """How the selector learns from a log of feedback; None where it does not."""
        return self.algorithm if isinstance(self.algorithm, FeedbackConfig) else None

    @property
    def trains_in_turns(self) -> bool:
        """Whether the retriever and other parts are trained, one after the other."""
        return isinstance(self.algorithm, AlternatingConfig)

    @property
    def trains_retriever(self) -> bool:
        """Whether the retriever is a part that is trained."""
        return "retriever" in self.algorithm.parts

    @property
    def trains_by_openrag(self) -> bool:
        """Whether the retriever is trained on pools of passages that were judged before."""
        return isinstance(self.algorithm, OpenRAGConfig | AlternatingConfig)

    @property
    def needs_golden_answers(self) -> bool:
        """Whether questions without golden answers are left out of training before it begins.

        JSA keeps them among its held-back questions, and leaves them out of its batches.
        """
        if isinstance(self.algorithm, FeedbackConfig | JSAConfig):
            return False
        if isinstance(self.algorithm, SFTConfig):
            return True
        judges = self.trains_by_openrag and self.openrag.labels != "gold"
        rewards = not self.trains_by_openrag or self.trains_in_turns
        return judges or (rewards and self.reward.needs_golden_answers)

    @property
    def num_trained_encoders(self) -> int:
        """Copies of the retriever's encoder that a worker trains."""
        return 2 if isinstance(self.algorithm, JSAConfig) or not self.openrag.tied else 1

    @property
    def trains_selector(self) -> bool:
        """Whether the selector is a part that is trained."""
        return "selector" in self.algorithm.parts

    @property
    def trains_generator(self) -> bool:
        """Whether the generator is a part that is trained."""
        return "generator" in self.algorithm.parts

    @property
    def systems(self) -> tuple[System, ...]:
        """Systems of the final comparison: those asked for, else those that fit what is trained.

        One passage has no order, so that its first alone and its reverse are no systems of their
        own; neither is the retriever's order behind a generator that is all that was trained.
        """
        if self.evaluation.systems is not None:
            return self.evaluation.systems
        orders: tuple[System, ...] = ("retriever_first", "retriever_reversed")
        by_generator: tuple[System, ...] = ("tuned_generator_first", "tuned_generator_reversed")
        if self.environment.num_selected == 1:
            orders = by_generator = ()
        found: tuple[System, ...] = ("no_retrieval",)
        if self.algorithm.parts == ("retriever",):
            found = (*found, "bm25", *(("dense", "hybrid") if self.retrieval.encoder else ()))
        elif self.environment.looks_further:
            found = (*found, *orders, "retriever_order")
            if self.environment.hops.edges:
                found = (*found, "hop_text", "hop_title", "hop_both")
        else:
            found = (*found, "random_order", *orders, "retriever_order")
        if self.trains_retriever:
            found = (*found, "original_retriever", "tuned_retriever")
        if self.trains_generator:
            if self.trains_selector:
                found = (*found, "tuned_selector")
            found = (*found, *by_generator)
            if self.algorithm.parts != ("generator",):
                found = (*found, "tuned_generator")
        if self.algorithm.parts != ("retriever",):
            found = (*found, "trained")
        return (*found, "gold_passages" if self.environment.looks_further else "oracle")

    @property
    def cache_path(self) -> Path:
        """`cache_dir` with `~` expanded."""
        return Path(self.cache_dir).expanduser()

    def to_json(self) -> str:
        """The whole configuration as indented JSON with a newline at the end."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the configuration."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, text: str, source: str = "config") -> RunConfig:
        """Parse `to_json`'s text, also that of an earlier version.

        Raises:
            ConfigError: naming `source`, the field, and for an unknown field the nearest valid one.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON: {error}") from error
        try:
            return cls.model_validate(with_algorithm(without_fixed(values), source))
        except ValidationError as error:  # a ValueError too
            raise ConfigError(f"{source}: {describe_validation_error(error)}") from error
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from error


def describe_validation_error(error: ValidationError) -> str:
    """One sentence for each problem that pydantic found, with a suggestion for unknown fields.

    Fields are named from the root of the configuration, whichever section was being read.
    """
    return describe(error, RunConfig)
