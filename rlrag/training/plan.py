"""The plan of a run as text: steps, memory, placement, and what is cut (`--dry-run`).

No model is loaded, and nothing is fetched: sizes of models that are not on this machine are read
from their names, and questions and passages that are not are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rlrag import plugins
from rlrag.config import (
    AlternatingConfig,
    FeedbackConfig,
    JSAConfig,
    OpenRAGConfig,
    OwnTrainerConfig,
    RunConfig,
)
from rlrag.data.checks import Tally
from rlrag.data.folder import command_that_makes
from rlrag.data.load import cut_passages, first_passages, load_questions
from rlrag.data.split import are_here, remarks, training_questions
from rlrag.errors import ConfigError, PromptTooLongError
from rlrag.models.directories import model_here, named_models
from rlrag.records import Passage
from rlrag.training.needs import GIB, NUMBER_BYTES, learners_of, num_parameters

_NUM_FIRST = 1_000

Found = tuple[str, str | None]
"""What was found, and a warning where it is to worry about."""


def describe_plan(config: RunConfig) -> str:
    """Steps, memory and placement of a run, a line each.

    Raises:
        ConfigError: when the size of a model is neither on this machine nor in its name, or there
            is no such reward, environment or part of one's own.
        EpisodeError: when the environment's spaces break its contract.
        DataError: when the training questions are here and cannot be trained on.
    """
    from rlrag.environment.rollout import check_environment
    from rlrag.rewards.composite import RewardModel

    RewardModel(config.reward)
    plugins.check_named(config)
    check_environment(config.environment)
    lines = [f"{config.recipe}: trains {' and '.join(config.algorithm.parts)}", *_steps(config)]
    room = _room(config)
    if room:
        lines.append(f"  passages    {'; '.join(found for found, _ in room)}")
    if config.feedback is None:
        lines += _generator_memory(config)
    lines += _learner_memory(config)
    lines += _placement(config)
    warnings = [warning for _, warning in room if warning]
    lines += [f"  warning     {sentence}" for sentence in [*warnings, *_remarks(config)]]
    return "\n".join(lines)


def _questions(config: RunConfig) -> tuple[str, int | None]:
    """The questions to train on, in words and counted; None where their number is not known."""
    data = config.data
    if are_here(data.train_questions):
        trained = len(training_questions(config).train)
    elif data.max_train_questions is None:
        return f"all questions of {data.train_questions}", None
    else:
        trained = max(data.max_train_questions - data.num_validation_questions, 0)
    return f"{trained:,} questions", trained


def _remarks(config: RunConfig) -> list[str]:
    """What is to be known of the questions before the run."""
    data = config.data
    if config.feedback is not None:
        return []
    if not are_here(data.train_questions):
        said = [f"{data.train_questions} is not here: it may have fewer questions"]
        if command := command_that_makes(Path(data.train_questions)):
            said[0] += f"; this makes it: {command}"
    else:
        evaluation = None
        if config.systems and are_here(data.eval_questions):
            evaluation = load_questions(data.eval_questions, config.cache_path)
            evaluation = evaluation.sample(data.max_eval_questions, seed=0)
        said = remarks(config, training_questions(config), evaluation)
    return said


def _retriever_steps(config: RunConfig) -> list[str]:
    openrag, training = config.openrag, config.training
    amount, trained = _questions(config)
    judged = f"{openrag.num_offline} a question"
    if trained is not None:
        judged += f", {trained * openrag.num_offline:,} in all"
    epochs = {"offline": openrag.offline_epochs, "online": openrag.online_epochs}
    stages = ", then ".join(f"{num} passes {stage}" for stage, num in epochs.items() if num)
    lines = [
        f"  data        {amount}; {stages}; {training.batch_size} questions a step",
        f"  retriever   {config.retrieval.kind}, loss {openrag.loss}, "
        f"{openrag.micro_batch_texts} texts embedded at once",
    ]
    if openrag.labels != "gold":
        lines.append(f"  offline     judges {judged}, each answered and scored once")
    if "online" in openrag.stages:
        lines.append(
            f"  online      ranks {openrag.num_online} passages a question anew at each step and "
            "scores them from the top to the first negative"
        )
    return lines


def _jsa_steps(config: RunConfig) -> list[str]:
    jsa, training = config.jsa, config.training
    amount, trained = _questions(config)
    if trained is not None:
        amount += f", {training.num_epochs * trained // training.batch_size:,} steps"
    return [
        f"  data        {amount}, {training.num_epochs} passes, {training.batch_size} a step",
        f"  retriever   {config.retrieval.kind}, its encoder of questions, and a posterior that "
        f"reads the answer too; {jsa.micro_batch_texts} texts embedded at once",
        f"  sampling    {jsa.mis_steps} proposals a question from the first {jsa.num_prior} "
        f"passages of the one and {jsa.num_posterior} of the other; the different ones are scored",
    ]


def _steps(config: RunConfig) -> list[str]:
    algorithm = config.algorithm
    if isinstance(algorithm, AlternatingConfig):
        return [
            f"  rounds      {algorithm.rounds}, each: the retriever, then "
            f"{' and '.join(algorithm.selection.parts)}",
            *_retriever_steps(config),
            *_steps(config.model_copy(update={"algorithm": algorithm.selection})),
        ]
    if isinstance(algorithm, JSAConfig):
        return _jsa_steps(config)
    if isinstance(algorithm, OpenRAGConfig):
        return _retriever_steps(config)
    if isinstance(algorithm, FeedbackConfig):
        return [
            f"  log         selections of {algorithm.log}, "
            f"{algorithm.held_back_share:.0%} of their questions held back; "
            f"{algorithm.num_epochs} passes, {config.training.batch_size} a step; no generator"
        ]
    dro, training = config.dro, config.training
    amount, trained = _questions(config)
    if isinstance(algorithm, OwnTrainerConfig):
        return [
            f"  data        {amount}",
            f"  trainer     {algorithm.name}; its steps and what they cost are not known here",
        ]
    if trained is not None:
        steps = training.num_epochs * trained // training.batch_size * dro.passes
        amount += f", {steps:,} steps"
    estep = "once a pass" if dro.refresh_every is None else f"every {dro.refresh_every} step(s)"
    environment, num_candidates = config.environment, config.retrieval.num_candidates
    drawn = f"selections of {environment.num_selected} from {num_candidates} candidates"
    if environment.looks_further:
        num_first = environment.hops.num_first or num_candidates
        drawn = f"paths of at most {environment.num_selected} picks from {num_first} hits on"
    return [
        f"  data        {amount}, {training.num_epochs} passes, {training.batch_size} a step",
        f"  E-step      {dro.num_samples} {drawn} a question; renewed {estep}; "
        f"{dro.passes} pass(es) over its samples",
        f"  rollouts    {training.num_epochs * dro.num_samples} a training question",
    ]


def _generator_memory(config: RunConfig) -> list[str]:
    generator = config.generator
    if generator.is_remote:
        return [
            f"  generator   {generator.answering_model} at {generator.url}, asked "
            f"{generator.batch_size} prompts at once by each process"
        ]
    where = "GPU" if generator.gpus_per_actor else "CPU"
    if generator.is_own:
        return [
            f"  generator   {generator.backend}, in each of {generator.num_actors} {where} actors; "
            "what it takes is not known here"
        ]
    size = num_parameters(generator.model, config.cache_path)
    weights = size * NUMBER_BYTES[generator.dtype] / GIB
    cache = (
        f"0.85 of the GPU less {weights:.1f} GiB"
        if generator.gpus_per_actor
        else f"{generator.kv_cache_gib} GiB"
    )
    return [
        f"  generator   {generator.model}, {size / 1e9:.2f} B parameters: {weights:.1f} GiB of "
        f"weights in each of {generator.num_actors} {where} actors; key-value cache {cache}"
    ]


def _learner_memory(config: RunConfig) -> list[str]:
    found = []
    for learner in learners_of(config):
        try:
            total = learner.num_bytes(num_parameters(learner.model, config.cache_path)) / GIB
        except ConfigError:
            # Names of encoders seldom tell their size, and a plan must not wait for a download.
            if learner.part != "retriever":
                raise
            found.append(
                f"  learner     {learner.model}: 16 bytes of weights and optimiser for each of its "
                "parameters (not known here) a worker"
            )
            continue
        if learner.part == "generator":
            settings = config.generator_training
            found.append(
                f"  M-step      generator, {settings.method}, {settings.sharding}: about "
                f"{total:.1f} GiB of weights and optimiser a worker, and the activations of "
                f"{settings.micro_batch_tokens:,} tokens"
            )
        elif learner.part == "retriever":
            found.append(
                f"  learner     {learner.model}: about {total:.1f} GiB of weights and optimiser a "
                "worker"
            )
        else:
            again = ", and as many weights again for the policy it started from"
            found.append(
                f"  M-step      selector, {config.selector.kind}: about {total:.1f} GiB of weights "
                f"and optimiser a worker{again if learner.trained == 1 else ''}"
            )
    return found


def _placement(config: RunConfig) -> list[str]:
    training, generator = config.training, config.generator
    if training.launcher == "local":
        return ["  placement   this process alone"]
    if config.feedback is not None:
        return [
            f"  placement   {training.num_workers} Ray Train worker(s) of "
            f"{training.worker_cpus:g} CPU and {training.worker_gpus:g} GPU"
        ]
    workers = (
        f"  placement   {training.num_workers} Ray Train worker(s) of {training.worker_cpus:g} CPU "
        f"and {training.worker_gpus:g} GPU"
    )
    if generator.is_remote:
        return [workers]
    cpus = training.num_workers * training.worker_cpus
    cpus += generator.num_actors * generator.cpus_per_actor
    gpus = training.num_workers * training.worker_gpus
    gpus += generator.num_actors * generator.gpus_per_actor
    return [
        f"{workers}, {generator.num_actors} generator actor(s) of "
        f"{generator.cpus_per_actor:g} CPU and {generator.gpus_per_actor:g} GPU; {cpus:g} CPU and "
        f"{gpus:g} GPU together",
        f"  nodes       workers: {training.worker_placement}; generator actors: "
        f"{generator.placement or 'where there is room'}",
    ]


def _room(config: RunConfig) -> list[Found]:
    """What is cut of the first 1,000 passages of the corpus, as loading and training count it.

    Over 1 % is a warning. What is not on this machine is not looked at: a remote corpus, the
    tokenizer of a model that has not been fetched or unpacked, the questions of prompts.
    """
    data = config.data
    if data.corpus is None or not are_here(data.corpus):
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
    for part, name in named_models(config).items():
        if part not in ("encoder", "vocabulary_encoder"):
            continue
        directory = model_here(name, config.cache_path)
        if directory is None:
            yield f"{name} is not here: what it reads of them is not counted", None
            continue
        if part == "encoder":
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
    from rlrag.generation.prompts import PromptBuilder, PromptCounts, cut_warning, load_tokenizer

    generator, size = config.generator, config.environment.num_selected
    if config.feedback is not None or not are_here(config.data.train_questions):
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
