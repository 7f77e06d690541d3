"""How much of a corpus's passages is kept, encoded and shown in prompts, found before a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from rlrag.config import RunConfig
from rlrag.data.checks import Tally
from rlrag.data.load import cut_passages, first_passages
from rlrag.data.split import are_here, training_questions
from rlrag.errors import PromptTooLongError
from rlrag.models.directories import model_here
from rlrag.records import Passage

_NUM_FIRST = 1_000

Found = tuple[str, str | None]
"""What was found, and a warning where it is to worry about."""


def describe_room(config: RunConfig) -> list[Found]:
    """What is cut of the first 1,000 passages of the corpus, as loading and training count it.

    Over 1 % is a warning. What is not on this machine is not looked at: a remote corpus, the
    tokenizer of a model that has not been fetched or unpacked, the questions of prompts.
    """
    data = config.data
    if not are_here(data.corpus):
        return []
    tally = Tally()
    first = islice(first_passages(data.corpus), _NUM_FIRST)
    passages = list(cut_passages(first, data.passage_words, tally))
    report = tally.report(data.corpus, len(passages))
    kept = (
        f"the first {len(passages):,} of {data.corpus}: data.passage_words {data.passage_words} "
        f"cuts {report.cut.count:,} of them"
    )
    warning = None if report.is_clean else report.cut_words()
    return [
        (kept, warning),
        *_encoded(config, passages),
        *_selected(config, passages),
        *_prompted(config, passages),
    ]


def _encoded(config: RunConfig, passages: Sequence[Passage]) -> Iterator[Found]:
    """What the encoders that search do not read."""
    from rlrag.retrieval.cut_tokens import count_cut
    from rlrag.retrieval.dense.encoder import TextEncoder
    from rlrag.retrieval.vocabulary.tokens import Vocabulary

    retrieval, texts = config.retrieval, [passage.contents for passage in passages]
    most = retrieval.encoder_max_tokens
    for name in (
        *([retrieval.encoder] if retrieval.encoder else []),
        *([retrieval.vocabulary_encoder] if retrieval.kind == "semi_parametric" else []),
    ):
        directory = model_here(name, config.cache_path)
        if directory is None:
            yield f"{name} is not here: what it reads of them is not counted", None
            continue
        if name == retrieval.encoder:
            encoder = TextEncoder(directory, retrieval.encoder_dtype, most, batch_size=1)
            lengths = encoder.count_tokens(texts)
        else:
            lengths = Vocabulary(directory, most).count_tokens(texts)
        cut = count_cut(lengths, most)
        yield f"{name} reads {most} tokens, and {cut.num_passages:,} are longer", cut.warning()


def _selected(config: RunConfig, passages: Sequence[Passage]) -> Iterator[Found]:
    """What a policy that reads texts does not read."""
    from rlrag.selection.unread import count_unread, unread_warning

    selector = config.selector
    if not selector.reads_texts:
        return
    directory = model_here(selector.model, config.cache_path)
    if directory is None:
        yield f"{selector.model} is not here: what the selector reads of them is not counted", None
        return
    cut = count_unread(selector, directory, [passage.contents for passage in passages])
    yield (
        f"the selector reads {cut.max_tokens} tokens, and {cut.num_passages:,} are longer",
        unread_warning(cut),
    )


def _prompted(config: RunConfig, passages: Sequence[Passage]) -> Iterator[Found]:
    """What prompts of training questions with so many passages as are picked have no room for."""
    from rlrag.generation.prompt_counts import PromptCounts, cut_warning
    from rlrag.generation.prompts import PromptBuilder, load_tokenizer

    generator, size = config.generator, config.environment.num_selected
    if config.training.experience is not None or not are_here(config.data.train_questions):
        return
    directory = model_here(generator.model, config.cache_path)
    if directory is None:
        yield f"{generator.model} is not here: what prompts have no room for is not counted", None
        return
    prompts = PromptBuilder(generator.prompt, load_tokenizer(directory), generator.stop)
    questions = training_questions(config).train.questions
    counts, num_cut, num_too_long = PromptCounts(), 0, 0
    shown = [passages[start : start + size] for start in range(0, len(passages), size)]
    for number, each in enumerate(shown):
        try:
            prompt = prompts.build(questions[number % len(questions)], each)
        except PromptTooLongError:
            num_too_long += 1
        else:
            counts.add(prompt, len(each))
            num_cut += prompt.num_cut_tokens > 0
    said = (
        f"prompts have room for {generator.prompt.max_prompt_tokens} tokens, and {num_cut:,} of "
        f"{len(shown):,} with {size} of them leave something out"
    )
    if num_too_long:
        said += f"; {num_too_long:,} more have none for the question"
    yield said, cut_warning(counts.shares())
