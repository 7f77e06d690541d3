"""A configuration in; its opened parts out: corpus, candidates, prompts, generator, reward, policy.

Training, evaluation and serving all assemble their parts here, so that what is served is what was
evaluated and trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlrag.config import RunConfig
from rlrag.data.corpus import Corpus
from rlrag.data.load import QuestionSet, load_corpus, load_questions
from rlrag.errors import DataError
from rlrag.generation.prompts import PromptBuilder
from rlrag.generation.protocol import Generator, Sampling
from rlrag.retrieval.build import RetrieverSet, open_retrievers
from rlrag.retrieval.candidates import CandidateTable
from rlrag.retrieval.tables import candidate_table
from rlrag.rewards.answering import AnsweringReward
from rlrag.rewards.composite import RewardModel
from rlrag.selection.build import TrainablePolicy, build_policy


@dataclass(frozen=True)
class Library:
    """A corpus with its retrievers."""

    corpus: Corpus
    retrievers: RetrieverSet


@dataclass(frozen=True)
class TrainingData:
    """Candidates of the questions to train on and of those held back; hashes of the sources."""

    train: CandidateTable
    validation: CandidateTable | None
    hashes: Mapping[str, str]


def open_library(config: RunConfig) -> Library:
    """Read the corpus and build or load its indexes."""
    corpus = load_corpus(config.data.corpus, config.cache_path, config.data.passage_words)
    return Library(corpus, open_retrievers(corpus, config.retrieval, config.cache_path))


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

    The held-back questions are the same for every `seed`, so that seeds share cached rewards.

    Raises:
        DataError: when fewer questions are left than one batch needs.
    """
    found = load_questions(config.data.train_questions, config.cache_path, library.corpus)
    chosen = found.sample(config.data.max_train_questions, seed=0)
    hashes = {"corpus": library.corpus.content_hash, "train_questions": chosen.content_hash}
    held_back = None
    if config.data.num_validation_questions:
        chosen, held_back = chosen.split(config.data.num_validation_questions, seed=0)
    if len(chosen.questions) < config.training.batch_size:
        raise DataError(
            f"{config.data.train_questions} leaves {len(chosen.questions)} questions to train on, "
            f"fewer than training.batch_size {config.training.batch_size}; lower it or "
            "data.num_validation_questions"
        )
    return TrainingData(
        train=candidates_of(library, chosen, config),
        validation=candidates_of(library, held_back, config) if held_back else None,
        hashes=hashes,
    )


def open_evaluation_data(config: RunConfig, library: Library) -> tuple[CandidateTable, str]:
    """Candidates of the evaluation questions, and the hash of those questions."""
    found = load_questions(config.data.eval_questions, config.cache_path, library.corpus)
    chosen = found.sample(config.data.max_eval_questions, seed=0)
    return candidates_of(library, chosen, config), chosen.content_hash


def open_policy(config: RunConfig, candidates: CandidateTable) -> TrainablePolicy:
    """The untrained policy for candidates of this shape."""
    return build_policy(
        config.selector,
        config.environment.num_selected,
        candidates.scores_QNC.shape[2],
        candidates.vector_size,
        config.cache_path,
        config.seed,
    )


def open_reward(config: RunConfig, generator: Generator, prompts: PromptBuilder) -> AnsweringReward:
    """The reward that answers from a selection and applies the configured functions."""
    sampling = Sampling(
        max_new_tokens=config.generator.max_new_tokens,
        temperature=config.generator.temperature,
        stop=config.generator.stop,
        seed=config.seed if config.generator.temperature else 0,
    )
    return AnsweringReward(generator, prompts, RewardModel(config.reward), sampling)
