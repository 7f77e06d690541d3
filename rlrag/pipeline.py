"""Builds the parts of a pipeline from a configuration, and loads bundles to answer questions.

Training, evaluation and serving all assemble their parts here, so that what is served is what was
evaluated and trained.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from rlrag.bundle import Bundle, load_bundle
from rlrag.config import RetrievalConfig, RewardConfig, RunConfig, describe_validation_error
from rlrag.config.sections import Section
from rlrag.data.corpus import Corpus
from rlrag.data.load import QuestionSet, corpus_of, load_questions
from rlrag.data.split import training_questions
from rlrag.environment.rollout import play_greedy
from rlrag.errors import ConfigError, RequestError, RlragError
from rlrag.files.directories import load_weights
from rlrag.generation.build import open_generator, resolve_config
from rlrag.generation.cache import CachedGenerator
from rlrag.generation.prompts import PromptBuilder, cut_warning
from rlrag.generation.protocol import Generator, Sampling
from rlrag.records import Passage, PathTurn, Question, Trajectories
from rlrag.retrieval.build import OpenShards, RetrieverSet, open_retrievers
from rlrag.retrieval.candidates import CandidateTable, Sources
from rlrag.retrieval.graph import PassageGraph
from rlrag.retrieval.tables import candidate_table, search_table
from rlrag.retrieval.tuned import tuned_retrieval
from rlrag.rewards.answering import AnsweringReward
from rlrag.rewards.composite import RewardModel
from rlrag.selection.build import TrainablePolicy, build_policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Library:
    """A corpus with its retrievers; `shipped` are the indexes of a bundle, where there are any.

    Passages that a retriever brings with their texts stand in the tables alone. Tables have sources
    where episodes look further (`looks_further`), along `graph` where there is one.
    """

    corpus: Corpus
    retrievers: RetrieverSet
    shipped: Path | None = None
    looks_further: bool = False
    graph: PassageGraph | None = None

    def search(self, questions: Sequence[str], num_candidates: int) -> CandidateTable:
        """The candidates of questions that are asked once; nothing is kept on disk.

        Raises:
            ConfigError: when the corpus has fewer passages than candidates are asked.
        """
        found = search_table(
            tuple(Question(str(n), text, ()) for n, text in enumerate(questions)),
            self.corpus,
            self.retrievers,
            num_candidates,
        )
        return self.with_sources(found)

    @property
    def sources(self) -> Sources:
        """What episodes look further in."""
        return Sources(self.retrievers.primary, self.graph, self.retrievers.encoder)

    def with_sources(self, table: CandidateTable) -> CandidateTable:
        """A table of this library, with what its episodes look further in."""
        if not self.looks_further:
            return table
        return replace(table, sources=self.sources)


@dataclass(frozen=True)
class TrainingData:
    """Candidates of the questions to train on and of those held back; hashes of the sources."""

    train: CandidateTable
    validation: CandidateTable | None
    hashes: Mapping[str, str]


def open_library(
    config: RunConfig, shipped: Path | None = None, corpus: Corpus | None = None
) -> Library:
    """Read the corpus and build or load its indexes.

    Args:
        config: Names the corpus and says how it is searched.
        shipped: Indexes of a bundle, which are not built again.
        corpus: That corpus, where it has been read.
    """
    corpus, environment = corpus_of(config) if corpus is None else corpus, config.environment
    retrievers = retrievers_of(corpus, config.retrieval, config.cache_path, shipped)
    graph = None
    if environment.looks_further and environment.hops.edges and corpus:
        indexes = config.cache_path / "indexes"
        graph = PassageGraph.open(corpus, indexes, environment.hops.edge_sources)
    return Library(corpus, retrievers, shipped, environment.looks_further, graph)


def retrievers_of(
    corpus: Corpus, config: RetrievalConfig, cache_dir: Path, shipped: Path | None = None
) -> RetrieverSet:
    """The retrievers of a corpus; parts of its vectors, if there are several, have Ray actors."""
    open_shards: OpenShards | None = None
    if config.num_shards > 1:
        from rlrag.shard_actors import ShardActors

        open_shards = ShardActors
    return open_retrievers(corpus, config, cache_dir, open_shards=open_shards, shipped=shipped)


def candidates_of(library: Library, questions: QuestionSet, config: RunConfig) -> CandidateTable:
    """The retriever's candidates of a question set, from the cache where they are known."""
    found = candidate_table(
        questions.questions,
        questions.content_hash,
        library.corpus,
        library.retrievers,
        config.retrieval,
        config.cache_path,
    )
    return library.with_sources(found)


def open_training_data(config: RunConfig, library: Library) -> TrainingData:
    """Training questions, sampled and split by the configuration's seed-independent rule.

    The held-back questions are the same for every `seed`, so that seeds share cached rewards. Where
    OpenRAG trains the retriever, the candidates are those that its offline stage labels.

    Raises:
        ConfigError: when the corpus has fewer passages than the offline stage labels.
        DataError: when no question has the golden answers that the run learns from, or fewer are
            left than one batch needs.
    """
    found = training_questions(config, library.corpus)
    chosen, held_back = found.train, found.held_back
    if config.trains_by_openrag:
        num_offline = config.openrag.num_offline
        if num_offline > len(library.corpus):
            raise ConfigError(
                f"algorithm.num_offline is {num_offline}, but the corpus has only "
                f"{len(library.corpus)} passages; lower it"
            )
        config = _retrieving(config, num_candidates=num_offline)
    train = candidates_of(library, chosen, config)
    return TrainingData(
        train=train,
        validation=candidates_of(library, held_back, config) if held_back else None,
        hashes={
            "corpus": train.corpus.content_hash,  # what the retriever brought is a part of it
            "train_questions": found.sampled.content_hash,
        },
    )


def validation_questions(config: RunConfig, library: Library) -> QuestionSet | None:
    """The questions that training holds back; None where it holds none back.

    A selector that learns from what a service logged holds back events, and no questions.
    """
    if config.feedback is not None:
        return None
    return training_questions(config, library.corpus).held_back


def open_evaluation_data(config: RunConfig, library: Library) -> tuple[CandidateTable, str]:
    """Candidates of the evaluation questions, and the hash of those questions."""
    found = load_questions(config.data.eval_questions, config.cache_path, library.corpus)
    chosen = found.sample(config.data.max_eval_questions, seed=0)
    return candidates_of(library, chosen, config), chosen.content_hash


def other_retrievers(
    config: RunConfig,
    library: Library,
    retriever_dir: Path | None,
    questions: QuestionSet | None = None,
) -> Mapping[str, Callable[[], CandidateTable]]:
    """Candidates of a set of questions from other retrievers, by evaluated system.

    A table is retrieved when it is first asked for; what its retriever lacks on disk is built then.

    Args:
        config: The run.
        library: Its corpus and retrievers.
        retriever_dir: The tuned encoder, where one was trained.
        questions: The set; the evaluation questions when unset.
    """
    found: dict[str, Callable[[], CandidateTable]] = {}
    kinds: tuple[str, ...] = ("bm25",) if library.corpus else ()
    if library.corpus and config.retrieval.encoder:
        kinds = ("bm25", "dense", "hybrid")
    configs = {kind: _retrieving(config, kind=kind) for kind in kinds}
    if retriever_dir is not None:
        configs["original_retriever"] = config
        tuned = tuned_retrieval(config.retrieval, retriever_dir)
        configs["tuned_retriever"] = config.model_copy(update={"retrieval": tuned})
    for name, other in configs.items():
        found[name] = cache(partial(_candidates_by, other, library, questions))
    return found


def _candidates_by(
    config: RunConfig, library: Library, questions: QuestionSet | None
) -> CandidateTable:
    retrievers = retrievers_of(library.corpus, config.retrieval, config.cache_path, library.shipped)
    library = replace(library, retrievers=retrievers)
    if questions is None:
        return open_evaluation_data(config, library)[0]
    return candidates_of(library, questions, config)


def _retrieving(config: RunConfig, **changes: object) -> RunConfig:
    return config.model_copy(update={"retrieval": config.retrieval.model_copy(update=changes)})


def open_policy(config: RunConfig, candidates: CandidateTable, base: Any = None) -> TrainablePolicy:
    """The policy that training starts from, for candidates of this shape.

    Args:
        config: The run.
        candidates: Any candidates of its retriever.
        base: A loaded model that the policy shares with the generator; see `ListwiseLMPolicy`.

    Raises:
        CheckpointError: when `selector.weights` is missing or belongs to another policy.
    """
    policy = build_policy(
        config.selector,
        config.environment,
        candidates.scores_QNC.shape[2],
        candidates.vector_size,
        config.cache_path,
        config.seed,
        base,
    )
    if config.selector.weights is not None:
        load_weights(policy, Path(config.selector.weights).expanduser())
    return policy


def open_reward(config: RunConfig, generator: Generator, prompts: PromptBuilder) -> AnsweringReward:
    """The reward that answers from a selection and applies the configured functions."""
    rewards = RewardModel(config.reward, config.cache_path)
    return AnsweringReward(generator, prompts, rewards, sampling_of(config))


def open_answering(
    config: RunConfig, generator: Generator, prompts: PromptBuilder
) -> AnsweringReward:
    """`open_reward` for those who ask it for answers alone.

    No reward function that the configuration names is imported; a built-in one takes their place.
    """
    config = config.model_copy(update={"reward": RewardConfig()})
    return open_reward(config, generator, prompts)


def sampling_of(config: RunConfig) -> Sampling:
    """How answers are decoded."""
    return Sampling(
        max_new_tokens=config.generator.max_new_tokens,
        temperature=config.generator.temperature,
        stop=config.generator.stop,
        seed=config.seed if config.generator.temperature else 0,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and what it was given from.

    Attributes:
        question: As it was asked.
        text: The answer.
        passages: The passages that were picked, in the order of the picks.
        logp: Sum of the log-probabilities of the answer's tokens under the generator, in nats; None
            where a server answers that does not give it.
        path: What the episode did turn by turn, where the bundle looks further than the candidates;
            else empty.
    """

    question: str
    text: str
    passages: tuple[Passage, ...]
    logp: float | None
    path: tuple[PathTurn, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A passage that the retriever found, and its ranking score."""

    passage: Passage
    score: float


class Pipeline:
    """A tuned pipeline in this process: retrieves, selects and answers as it was evaluated.

    A part is opened when it is first needed: who only selects waits for no language model. Calls
    from several threads wait for each other. Close it, or use it in a `with` block, to free the
    generator.

    Args:
        bundle: A loaded bundle.
        config: How its parts are opened; the bundle's own configuration when unset.
        launcher: `local` keeps the generator in this process, `ray` in actors of a cluster that
            the caller has joined.
        tuned: Whether the generator has its trained weights from the start.

    Example:
        >>> from rlrag import load_pipeline
        >>> with load_pipeline("runs/quickstart/bundle") as pipeline:  # doctest: +SKIP
        ...     print(pipeline.answer("What is the capital of Mongolia?").text)
        Ulaanbaatar
    """

    def __init__(
        self,
        bundle: Bundle,
        config: RunConfig | None = None,
        launcher: str = "local",
        tuned: bool = True,
    ) -> None:
        if config is not None:
            bundle = replace(bundle, config=config)
        self.bundle = bundle
        self.config = bundle.searching_config
        self._launcher = launcher
        self._tuned = tuned
        self._opened: tuple[CachedGenerator, PromptBuilder] | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the generator; the next answer opens it again."""
        with self._lock:
            if self._opened is not None:
                self._opened[0].close()
                self._opened = None

    @cached_property
    def library(self) -> Library:
        """Corpus and retrievers, with the bundle's own encoder where one was trained."""
        return open_library(self.config, self.bundle.index_dir)

    @property
    def generator(self) -> CachedGenerator:
        """The generator, whose results are kept on disk."""
        return self._open()[0]

    @property
    def prompts(self) -> PromptBuilder:
        """What makes prompts of questions and passages."""
        return self._open()[1]

    def _open(self) -> tuple[CachedGenerator, PromptBuilder]:
        with self._lock:
            if self._opened is None:
                config = self.config
                self._opened = open_generator(config.generator, self._launcher, config.cache_path)
                if self._tuned:
                    self.tune()
            return self._opened

    def tune(self) -> None:
        """Give the generator its trained weights, where it was trained.

        Raises:
            CheckpointError: when they are damaged.
        """
        dtype = resolve_config(self.config.generator, self._launcher).dtype
        weights = self.bundle.generator_weights(dtype)
        if weights is not None:
            self.generator.load_weights(weights)

    def retrieve(self, question: str) -> list[Found]:
        """The candidates of a question, in the retriever's order.

        Raises:
            RequestError: when the question is empty.
        """
        candidates = self.candidates([question])
        scores = candidates.scores_QNC[0, :, 0].tolist()
        return [Found(*found) for found in zip(candidates.passages(0), scores, strict=True)]

    def select(self, question: str) -> tuple[Passage, ...]:
        """The passages that the trained policy picks, in its order; asks no generator.

        Raises:
            RequestError: when the question is empty.
        """
        return self.picks(self.candidates([question]))[0]

    def answer(self, question: str) -> Answer:
        """Retrieve, select and answer.

        Raises:
            RequestError: when the question is empty.
            PromptTooLongError: when it leaves no room for an answer.
            GenerationError: when the generator fails.
        """
        [answer] = self.answer_many([question])
        if isinstance(answer, RlragError):
            raise answer
        return answer

    async def answer_async(self, question: str) -> Answer:
        """`answer`, in a thread, so that an event loop goes on meanwhile."""
        return await asyncio.to_thread(self.answer, question)

    def answer_many(self, questions: Sequence[str]) -> list[Answer | RlragError]:
        """Answer questions together, which is faster than one by one.

        What keeps a question from being answered is the error in its place. Where prompts had no
        room for all of what was picked, a warning is logged.

        Raises:
            RequestError: when a question is empty.
            GenerationError: when the generator itself fails.
        """
        if not questions:
            return []
        with self._lock:
            candidates = self.candidates(questions)
            played = self._played(candidates)
            rewards = open_answering(self.config, self.generator.inner, self.prompts)
            answers = rewards.answer(candidates.questions, played.evidence)
        if warning := cut_warning(rewards.prompt_counts.shares()):
            logger.warning("%s", warning)
        return [
            found
            if isinstance(found, RlragError)
            else Answer(question, found.text, passages, found.logp, path.turns() if path else ())
            for question, passages, path, found in zip(
                questions, played.evidence, played.paths, answers, strict=True
            )
        ]

    def candidates(self, questions: Sequence[str]) -> CandidateTable:
        """The candidates of questions, as policies and environments take them."""
        for place, question in enumerate(questions):
            if not question.strip():
                raise RequestError(f"question {place} is empty; give a question")
        with self._lock:
            return self.library.search(questions, self.config.retrieval.num_candidates)

    def picks(self, candidates: CandidateTable) -> Sequence[tuple[Passage, ...]]:
        """What the policy's most probable episodes end with, one row a question."""
        return self._played(candidates).evidence

    def _played(self, candidates: CandidateTable) -> Trajectories:
        """The policy's most probable episodes, one a question."""
        with self._lock:
            return play_greedy(self.config.environment, self.bundle.policy, candidates)


def load_pipeline(
    bundle: Path | str,
    *,
    corpus: str | None = None,
    backend: str | None = None,
    allow_code: Collection[str] = (),
) -> Pipeline:
    """Open a bundle in this process.

    Args:
        bundle: Directory of the bundle.
        corpus: Takes the place of the corpus that was trained on, in any form of `data.corpus`.
        backend: What the generator runs in, as `generator.backend`: `vllm`, or `transformers`,
            which the bundle's `auto` stands for here, or one of your own.
        allow_code: What the bundle names of somebody's own and may be imported, as it names it: an
            environment `module:namespace/Name-v0`, a retriever, policy or generator
            `package.module:name`.

    Raises:
        CheckpointError: when the bundle is absent, damaged or of another format.
        ConfigError: when it names code that the caller does not, or an argument is wrong.
    """
    loaded = load_bundle(Path(bundle), allow_code)
    config, changes = loaded.config, {}
    if corpus is not None:
        changes["data"] = _changed(config.data, corpus=corpus)
    if backend is not None:
        changes["generator"] = _changed(config.generator, backend=backend)
    config = config.model_copy(update=changes)
    return Pipeline(loaded, config)


def _changed(section: Section, **values: str) -> Section:
    try:
        return type(section).model_validate(section.model_dump() | values)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error)) from error
