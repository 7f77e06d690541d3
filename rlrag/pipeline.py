"""A configuration in; its opened parts out: corpus, candidates, prompts, generator, reward, policy.

Training, evaluation and serving all assemble their parts here, so that what is served is what was
evaluated and trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from rlrag.config import RetrievalConfig, RewardConfig, RunConfig
from rlrag.data.corpus import Corpus
from rlrag.data.load import QuestionSet, load_corpus, load_questions
from rlrag.data.split import training_questions
from rlrag.errors import ConfigError
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator, Sampling
from rlrag.retrieval.build import OpenShards, RetrieverSet, open_retrievers
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.tables import candidate_table
from rlrag.retrieval.tuned import tuned_retrieval
from rlrag.rewards.answering import AnsweringReward
from rlrag.rewards.composite import RewardModel
from rlrag.selection.build import TrainablePolicy, build_policy
from rlrag.storage import load_weights


@dataclass(frozen=True)
class Library:
    """A corpus with its retrievers; `shipped` are the indexes of a bundle, where there are any."""

    corpus: Corpus
    retrievers: RetrieverSet
    shipped: Path | None = None


@dataclass(frozen=True)
class TrainingData:
    """Candidates of the questions to train on and of those held back; hashes of the sources."""

    train: CandidateTable
    validation: CandidateTable | None
    hashes: Mapping[str, str]


def open_library(config: RunConfig, shipped: Path | None = None) -> Library:
    """Read the corpus and build or load its indexes.

    Args:
        config: Names the corpus and says how it is searched.
        shipped: Indexes of a bundle, which are not built again.
    """
    corpus = load_corpus(config.data.corpus, config.cache_path, config.data.passage_words)
    retrievers = retrievers_of(corpus, config.retrieval, config.cache_path, shipped)
    return Library(corpus, retrievers, shipped)


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
    return candidate_table(
        questions.questions,
        questions.content_hash,
        library.corpus,
        library.retrievers,
        config.retrieval,
        config.cache_path,
    )


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
    hashes = {"corpus": library.corpus.content_hash, "train_questions": found.sampled.content_hash}
    if config.trains_by_openrag:
        num_offline = config.openrag.num_offline
        if num_offline > len(library.corpus):
            raise ConfigError(
                f"openrag.num_offline is {num_offline}, but the corpus has only "
                f"{len(library.corpus)} passages; lower it"
            )
        config = _retrieving(config, num_candidates=num_offline)
    return TrainingData(
        train=candidates_of(library, chosen, config),
        validation=candidates_of(library, held_back, config) if held_back else None,
        hashes=hashes,
    )


def validation_questions(config: RunConfig, library: Library) -> QuestionSet | None:
    """The questions that training holds back; None where it holds none back.

    A selector that learns from what a service logged holds back events, and no questions.
    """
    if config.training.experience is not None:
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
    kinds = ("bm25", "dense", "hybrid") if config.retrieval.encoder else ("bm25",)
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
        config.environment.num_selected,
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
    return AnsweringReward(generator, prompts, RewardModel(config.reward), sampling_of(config))


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
