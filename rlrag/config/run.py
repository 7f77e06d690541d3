"""`RunConfig`: all sections of a run, to and from JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from rlrag.config.complaints import describe
from rlrag.config.fixed import without_fixed
from rlrag.config.sections import (
    RETRIEVERS,
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    RetrievalConfig,
    RewardConfig,
    Section,
    SelectorConfig,
)
from rlrag.config.training import (
    DROConfig,
    EvaluationConfig,
    GeneratorTrainingConfig,
    JSAConfig,
    MirrorConfig,
    OffPolicyConfig,
    OpenRAGConfig,
    System,
    TrainingConfig,
)
from rlrag.errors import ConfigError


class RunConfig(Section):
    """One run, completely."""

    recipe: str = "custom"
    """Name of the recipe that this came from."""
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
    dro: DROConfig = DROConfig()
    off_policy: OffPolicyConfig = OffPolicyConfig()
    openrag: OpenRAGConfig = OpenRAGConfig()
    jsa: JSAConfig = JSAConfig()
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
        if not self.training.parts:
            raise ValueError(
                "training.parts is empty; train 'retriever', 'selector', 'generator' or several"
            )
        if len(set(self.training.parts)) < len(self.training.parts):
            raise ValueError(f"training.parts is {list(self.training.parts)}; name each part once")
        if self.data.corpus is None:
            self._check_no_corpus()
        self._check_systems()
        self._check_patience()
        if self.generator_training.share_base:
            self._check_shared_base()
        if self.training.experience is not None:
            self._check_experience()
        if self.training.start_from is not None:
            self._check_start()
        if self.training.objective == "jsa":
            self._check_jsa()
        elif self.trains_retriever:
            self._check_trained_retriever()
        if self.training.rounds > 1 and not self.trains_in_turns:
            raise ValueError(
                f"training.rounds is {self.training.rounds}, but only a run that trains the "
                "retriever and another part takes turns; set it to 1"
            )
        if self.trains_in_turns and self.training.objective == "sft":
            raise ValueError("training.objective 'sft' takes no turns with the retriever; use dro")
        if self.training.objective == "sft" and self.training.parts != ("generator",):
            raise ValueError(
                "training.objective 'sft' trains the generator alone; set training.parts generator"
            )
        if self.training.overlap and self.dro.passes > 1:
            raise ValueError(
                f"training.overlap draws across the end of an E-step, so that dro.passes "
                f"{self.dro.passes} would not all see the same draws; use one pass, or no overlap"
            )
        if self.training.overlap and self.dro.baseline != "none" and self.dro.clip_ratio is None:
            raise ValueError(
                f"training.overlap draws with a policy that is one update old and dro.baseline "
                f"{self.dro.baseline!r} is unbiased on-policy only; set dro.clip_ratio, or use "
                "baseline 'none'"
            )
        versions_overlap = self.training.overlap and self.trains_generator
        if versions_overlap and not self.generator_training.max_staleness:
            raise ValueError(
                "training.overlap rewards with generator weights that are one version old; set "
                "generator_training.max_staleness to 1, or train without overlap"
            )
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
                f"training.parts is {list(self.training.parts)}, but generator.backend "
                f"{backend!r} {what}, whose weights cannot be trained from here; leave the "
                "generator out, or use vllm or transformers"
            )
        if self.reward.golden_answers == "all" and self.training.objective != "dro":
            raise ValueError(
                "reward.golden_answers 'all' weighs what DRO trains on; with training.objective "
                f"{self.training.objective!r} leave it at 'likeliest'"
            )
        generator = self.generator
        if generator.max_model_len < generator.prompt.max_prompt_tokens + generator.max_new_tokens:
            raise ValueError(
                f"generator.max_model_len {generator.max_model_len} is shorter than "
                f"max_prompt_tokens {generator.prompt.max_prompt_tokens} plus max_new_tokens "
                f"{generator.max_new_tokens}"
            )
        return self

    def _check_no_corpus(self) -> None:
        retrieval = self.retrieval
        searching = [n for n in self.evaluation.systems or () if n in ("bm25", "dense", "hybrid")]
        for is_there, what in (
            (retrieval.kind in RETRIEVERS, f"retrieval.kind {retrieval.kind!r} searches one"),
            (retrieval.bm25_scores, "retrieval.bm25_scores counts the words of one"),
            (retrieval.index != "flat", f"retrieval.index {retrieval.index!r} is built of one"),
            (retrieval.num_shards > 1, f"retrieval.num_shards {retrieval.num_shards} divides one"),
            (searching, f"evaluation.systems {', '.join(searching)} search one"),
            (self.training.experience, "training.experience names passages of one by their ids"),
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
                    f"evaluation.systems asks for {name}, but training.parts trains no retriever; "
                    "leave it out"
                )
        for name in ("dense", "hybrid"):
            if name in asked and self.retrieval.encoder is None:
                raise ValueError(
                    f"evaluation.systems asks for {name}, but retrieval.encoder is unset; name one "
                    "or leave the system out"
                )

    def _check_patience(self) -> None:
        held_back: tuple[str, float] = (
            ("data.num_validation_questions", self.data.num_validation_questions)
            if self.training.experience is None
            else ("off_policy.held_back_share", self.off_policy.held_back_share)
        )
        if self.training.patience is not None and not held_back[1]:
            raise ValueError(
                f"training.patience {self.training.patience} counts validations, but "
                f"{held_back[0]} is 0, so that there are none; hold some back, or unset it"
            )

    def _check_experience(self) -> None:
        if self.training.objective != "dro":
            raise ValueError(
                "training.experience learns from a log by inverse propensities, but "
                f"training.objective is {self.training.objective!r}; leave it at dro"
            )
        if self.training.parts != ("selector",):
            raise ValueError(
                f"training.experience trains the selector alone, but training.parts is "
                f"{list(self.training.parts)}; set it to selector"
            )
        if self.selector.imitation_steps:
            raise ValueError(
                f"training.experience starts from selector.weights, but selector.imitation_steps "
                f"is {self.selector.imitation_steps}; set it to 0"
            )

    def _check_start(self) -> None:
        start = f"training.start_from is {self.training.start_from!r}, but"
        if self.trains_in_turns:
            raise ValueError(
                f"{start} a run in turns has no checkpoints of all parts; train one of the turns, "
                "with its parts alone"
            )
        if self.training.experience is not None:
            raise ValueError(
                f"{start} training.experience starts from selector.weights; name the checkpoint's "
                "policy.safetensors there"
            )
        if self.selector.weights is not None:
            raise ValueError(
                f"{start} selector.weights {self.selector.weights!r} names weights to start from "
                "too; give one of them"
            )

    def _check_shared_base(self) -> None:
        selector, training = self.selector, self.generator_training
        if set(self.training.parts) != {"selector", "generator"}:
            raise ValueError(
                "generator_training.share_base needs a run that trains selector and generator and "
                f"nothing else, but training.parts is {list(self.training.parts)}; set it to False"
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

    def _check_jsa(self) -> None:
        parts, kind = self.training.parts, self.retrieval.kind
        if set(parts) not in ({"retriever"}, {"retriever", "generator"}):
            raise ValueError(
                f"training.objective 'jsa' trains the retriever, alone or with the generator, but "
                f"training.parts is {list(parts)}; set it to retriever or retriever,generator"
            )
        if kind not in ("dense", "semi_parametric"):
            raise ValueError(
                f"training.objective 'jsa' trains the retriever, but retrieval.kind {kind!r} has "
                "nothing to train; use dense or semi_parametric"
            )
        if self.training.rounds > 1:
            raise ValueError(
                f"training.objective 'jsa' trains its parts together, but training.rounds is "
                f"{self.training.rounds}; set it to 1"
            )
        if self.training.overlap:
            raise ValueError(
                "training.overlap draws the selections of a policy ahead, and training.objective "
                "'jsa' has no policy; leave it out"
            )

    def _check_trained_retriever(self) -> None:
        retrieval, openrag = self.retrieval, self.openrag
        if retrieval.kind not in ("dense", "semi_parametric"):
            raise ValueError(
                f"training.parts names the retriever, but retrieval.kind {retrieval.kind!r} has "
                "nothing to train; use dense or semi_parametric"
            )
        if not self.trains_by_openrag:
            return
        if openrag.stages not in (("offline",), ("online",), ("offline", "online")):
            raise ValueError(
                f"openrag.stages is {list(openrag.stages)}; name offline, online or both in this "
                "order"
            )
        if openrag.labels == "gold" and openrag.loss == "kl":
            raise ValueError(
                "openrag.loss 'kl' distils the generator's likelihoods, which openrag.labels "
                "'gold' does without; use loss contrastive"
            )
        if openrag.first_stage == "bm25" and not retrieval.bm25_scores:
            raise ValueError(
                "openrag.first_stage 'bm25' needs a BM25 index; set retrieval.bm25_scores True"
            )
        if openrag.first_stage == "bag_of_tokens" and retrieval.kind == "dense":
            raise ValueError(
                "openrag.first_stage 'bag_of_tokens' is searched by vectors over a vocabulary, "
                "which retrieval.kind 'dense' has not; use frozen or bm25"
            )
        if openrag.vectors == "one_whole" and retrieval.kind == "dense":
            raise ValueError(
                "openrag.vectors 'one_whole' is for semi_parametric; vectors of a dense encoder "
                "are whole"
            )
        if openrag.vectors == "one_whole" and openrag.loss == "kl":
            raise ValueError(
                "openrag.vectors 'one_whole' belongs to openrag.loss 'contrastive'; leave it out"
            )
        if not openrag.tied and retrieval.kind == "dense":
            raise ValueError(
                "openrag.tied False is for semi_parametric; a dense encoder reads questions and "
                "passages alike"
            )
        if openrag.num_online < self.environment.num_selected:
            raise ValueError(
                f"openrag.num_online {openrag.num_online} finds fewer passages than "
                f"environment.num_selected {self.environment.num_selected} shows"
            )

    @property
    def algorithm(self) -> str:
        """What trains the parts: `dro`, `sft`, `openrag`, `jsa`, `off-policy`, or one's own."""
        if self.training.experience is not None:
            return "off-policy"
        if self.trains_retriever and self.training.objective in ("dro", "sft"):
            return "openrag"
        return self.training.objective

    @property
    def trains_in_turns(self) -> bool:
        """Whether the retriever and other parts are trained, one after the other."""
        return self.trains_by_openrag and len(self.training.parts) > 1

    @property
    def trains_retriever(self) -> bool:
        """Whether the retriever is a part that is trained."""
        return "retriever" in self.training.parts

    @property
    def trains_by_openrag(self) -> bool:
        """Whether the retriever is trained on pools of passages that were judged before."""
        return self.algorithm == "openrag"

    @property
    def needs_golden_answers(self) -> bool:
        """Whether questions without golden answers are left out of training before it begins.

        JSA keeps them among its held-back questions, and leaves them out of its batches.
        """
        if self.algorithm in ("off-policy", "jsa"):
            return False
        if self.algorithm == "sft":
            return True
        judges = self.trains_by_openrag and self.openrag.labels != "gold"
        rewards = not self.trains_by_openrag or self.trains_in_turns
        return judges or (rewards and self.reward.needs_golden_answers)

    @property
    def num_trained_encoders(self) -> int:
        """Copies of the retriever's encoder that a worker trains."""
        return 2 if self.algorithm == "jsa" or not self.openrag.tied else 1

    @property
    def trains_selector(self) -> bool:
        """Whether the selector is a part that is trained."""
        return "selector" in self.training.parts

    @property
    def trains_generator(self) -> bool:
        """Whether the generator is a part that is trained."""
        return "generator" in self.training.parts

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
        if self.training.parts == ("retriever",):
            found = (*found, "bm25", *(("dense", "hybrid") if self.retrieval.encoder else ()))
        else:
            found = (*found, "random_order", *orders, "retriever_order")
        if self.trains_retriever:
            found = (*found, "original_retriever", "tuned_retriever")
        if self.trains_generator:
            if self.trains_selector:
                found = (*found, "tuned_selector")
            found = (*found, *by_generator)
            if self.training.parts != ("generator",):
                found = (*found, "tuned_generator")
        if self.training.parts != ("retriever",):
            found = (*found, "trained")
        return (*found, "oracle")

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
        """Parse `to_json`'s text, also of a version whose constants were settings.

        Raises:
            ConfigError: naming `source`, the field, and for an unknown field the nearest valid one.
        """
        try:
            return cls.model_validate(without_fixed(json.loads(text)))
        except ValidationError as error:  # a ValueError too
            raise ConfigError(f"{source}: {describe_validation_error(error)}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{source} is not JSON: {error}") from error


def describe_validation_error(error: ValidationError) -> str:
    """One sentence for each problem that pydantic found, with a suggestion for unknown fields.

    Fields are named from the root of the configuration, whichever section was being read.
    """
    return describe(error, RunConfig)
