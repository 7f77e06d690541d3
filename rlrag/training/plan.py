"""The plan of a run as text: steps, memory and placement (`--dry-run`).

No model is loaded, and nothing is fetched: sizes of models that are not on this machine are read
from their names, and questions and passages that are not are not counted.
"""

from __future__ import annotations

import re
from pathlib import Path

from rlrag import plugins
from rlrag.config import BUILTIN_ENCODER, BUILTIN_MODELS, RunConfig
from rlrag.data.folder import command_that_makes
from rlrag.data.load import load_questions
from rlrag.data.split import are_here, remarks, training_questions
from rlrag.errors import ConfigError

GIB = 2**30
NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}
_SIZE_IN_NAME = re.compile(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", re.IGNORECASE)
ADAPTER_SHARE = 0.01
"""A LoRA adapter's parameters as a share of the model's, roughly, at rank 16."""


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
    from rlrag.training.plan_room import describe_room

    RewardModel(config.reward)
    plugins.check_named(config)
    check_environment(config.environment)
    lines = [f"{config.recipe}: trains {' and '.join(config.training.parts)}", *_steps(config)]
    room = describe_room(config)
    if room:
        lines.append(f"  passages    {'; '.join(found for found, _ in room)}")
    if config.training.experience is None:
        lines += _generator_memory(config)
    lines += _learner_memory(config)
    lines += _placement(config)
    warnings = [warning for _, warning in room if warning]
    lines += [f"  warning     {sentence}" for sentence in [*warnings, *_remarks(config)]]
    return "\n".join(lines)


def num_parameters(name: str, cache_dir: Path) -> int:
    """Parameters of a model: counted where it is on this machine, else read from its name.

    Raises:
        ConfigError: when neither says it.

    Example:
        >>> num_parameters("meta-llama/Meta-Llama-3-8B-Instruct", Path("/nowhere"))
        8000000000
    """
    named = _SIZE_IN_NAME.search(name.rsplit("/", 1)[-1])
    if named and not Path(name).expanduser().is_dir():
        return round(float(named[1]) * (1e9 if named[2].lower() == "b" else 1e6))
    from safetensors import safe_open

    directory = _on_this_machine(name, cache_dir)
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                size = 1
                for length in tensors.get_slice(key).get_shape():
                    size *= length
                total += size
    return total


def _on_this_machine(name: str, cache_dir: Path) -> Path:
    """The directory of a model that need not be fetched; a plan must not wait for a download."""
    from rlrag.models.directories import model_here, resolve_model

    if name in BUILTIN_MODELS:
        return resolve_model(name, cache_dir)
    directory = model_here(name, cache_dir)
    if directory is None:
        raise ConfigError(
            f"the size of model {name!r} is unknown: it is not on this machine and its name does "
            "not say it (as '8B' does); give a local path"
        )
    return directory


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
    if config.training.experience is not None:
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
    stages = ", then ".join(f"{epochs[stage]} passes {stage}" for stage in openrag.stages)
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
    if config.trains_in_turns:
        others = tuple(part for part in config.training.parts if part != "retriever")
        turn = config.training.model_copy(update={"parts": others})
        return [
            f"  rounds      {config.training.rounds}, each: the retriever, then "
            f"{' and '.join(others)}",
            *_retriever_steps(config),
            *_steps(config.model_copy(update={"training": turn})),
        ]
    if config.algorithm == "jsa":
        return _jsa_steps(config)
    if config.algorithm == "openrag":
        return _retriever_steps(config)
    if config.algorithm == "off-policy":
        off_policy = config.off_policy
        return [
            f"  log         selections of {config.training.experience}, "
            f"{off_policy.held_back_share:.0%} of their questions held back; "
            f"{off_policy.num_epochs} passes, {config.training.batch_size} a step; no generator"
        ]
    dro, training = config.dro, config.training
    amount, trained = _questions(config)
    if plugins.is_own(config.algorithm):
        return [
            f"  data        {amount}",
            f"  trainer     {config.algorithm}; its steps and what they cost are not known here",
        ]
    if trained is not None:
        steps = training.num_epochs * trained // training.batch_size * dro.passes
        amount += f", {steps:,} steps"
    estep = "once a pass" if dro.refresh_every is None else f"every {dro.refresh_every} step(s)"
    return [
        f"  data        {amount}, {training.num_epochs} passes, {training.batch_size} a step",
        f"  E-step      {dro.num_samples} selections of {config.environment.num_selected} from "
        f"{config.retrieval.num_candidates} candidates a question; renewed "
        f"{estep}; {dro.passes} pass(es) over its samples",
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
    """float32 weights, gradients and two AdamW moments: 16 bytes a trained parameter."""
    found = []
    workers = config.training.num_workers
    if config.trains_generator:
        settings = config.generator_training
        size = num_parameters(config.generator.model, config.cache_path)
        trained = size if settings.method == "full" else size * ADAPTER_SHARE
        total = (4 * size + 12 * trained) / GIB
        share = total / workers if settings.sharding == "fsdp2" else total
        found.append(
            f"  M-step      generator, {settings.method}, {settings.sharding}: about {share:.1f} "
            f"GiB of weights and optimiser a worker, and the activations of "
            f"{settings.micro_batch_tokens:,} tokens"
        )
    if config.trains_retriever:
        retrieval = config.retrieval
        model = (
            retrieval.vocabulary_encoder
            if retrieval.kind == "semi_parametric"
            else retrieval.encoder or BUILTIN_ENCODER
        )
        found.append(f"  learner     {model}: {_encoder_memory(model, config)} a worker")
    if "selector" in config.training.parts and config.selector.reads_texts:
        size = num_parameters(config.selector.model, config.cache_path)
        by_adapter = config.selector.kind == "listwise_lm" and config.selector.adapter_rank
        trained = size * ADAPTER_SHARE if by_adapter else size
        held = 0 if config.generator_training.share_base else size
        total = (4 * held + 12 * trained) / GIB
        again = "" if by_adapter else ", and as many weights again for the policy it started from"
        found.append(
            f"  M-step      selector, {config.selector.kind}: about {total:.1f} GiB of weights and "
            f"optimiser a worker{again}"
        )
    return found


def _encoder_memory(model: str, config: RunConfig) -> str:
    """Names of encoders seldom tell their size, and a plan must not wait for a download."""
    try:
        size = num_parameters(model, config.cache_path) * config.num_trained_encoders
    except ConfigError:
        return "16 bytes of weights and optimiser for each of its parameters (not known here)"
    return f"about {16 * size / GIB:.1f} GiB of weights and optimiser"


def _placement(config: RunConfig) -> list[str]:
    training, generator = config.training, config.generator
    if training.launcher == "local":
        return ["  placement   this process alone"]
    if training.experience is not None:
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
