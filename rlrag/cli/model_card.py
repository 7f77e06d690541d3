"""Writes the model card of a bundle, with the front matter that model hubs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlrag.bundle_files import BundleFiles
from rlrag.config import BETTER_GENERATOR, BUILTIN_ENCODER, BUILTIN_GENERATOR, RunConfig
from rlrag.models.licences import UNKNOWN, PartLicence

_HUB_PREFIX = "hub:"
_HUB_IDS = {
    BUILTIN_GENERATOR: "HuggingFaceTB/SmolLM2-135M-Instruct",
    BETTER_GENERATOR: "google/gemma-3-270m",
    BUILTIN_ENCODER: "sentence-transformers/all-MiniLM-L6-v2",
}
_METRICS = {"em": "exact_match", "f1": "f1"}
_SYSTEMS = ("trained", "tuned_retriever")


def model_card(files: BundleFiles) -> str:
    """The text of a bundle's README.md.

    Models and files are named without their folders, which nobody else has.
    """
    config, facts, licences = files.config, files.facts, files.licences
    corpus = "none" if config.data.corpus is None else f"`{_short(config.data.corpus)}`"
    source = "what its retriever brings" if config.data.corpus is None else "a corpus"
    parts = " and ".join(config.algorithm.parts)
    title = f"{config.recipe}, step {facts.step}"
    lines = [
        "---",
        _front_matter(config, title, licences, files.evaluation),
        "---",
        "",
        f"# {title}",
        "",
        f"A pipeline that answers questions from {source}: {config.retrieval.kind} retrieval of "
        f"{config.retrieval.num_candidates} candidates, a {config.selector.kind} selector that "
        f"picks {config.environment.num_selected} of them, and the generator "
        f"`{_short(config.generator.answering_model)}`. Trained: {parts}, by rlrag "
        f"{facts.code_version}.",
        "",
        f"Corpus: {corpus}. Training questions: "
        f"`{_short(config.data.train_questions)}`. `bundle.json` has the hashes of both.",
        "",
        *_results(config, files.evaluation),
        *_use(files.adapter_dir is not None),
        "## Licences",
        "",
        "| part | name | licence | source |",
        "|---|---|---|---|",
        *(
            f"| {each.part} | {_short(each.name)} | {each.licence} | {each.source} |"
            for each in licences
        ),
        "",
    ]
    return "\n".join(lines)


def _front_matter(
    config: RunConfig,
    title: str,
    licences: Sequence[PartLicence],
    evaluation: Mapping[str, Any] | None,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    models = dict.fromkeys(each.name for each in licences if each.part != "corpus")
    sources = (config.data.corpus, config.data.train_questions)
    data = dict.fromkeys(name for name in sources if name is not None)
    results = []
    system = _own_system(evaluation)
    if evaluation is not None and system is not None:
        questions = _short(config.data.eval_questions)
        found = evaluation["systems"][system]
        results = [
            EvalResult(
                task_type="question-answering",
                dataset_type=questions,
                dataset_name=questions,
                metric_type=metric,
                metric_value=round(found[name], 4),
                metric_args={"ci95": [round(end, 4) for end in found[f"{name}_ci95"]]},
            )
            for name, metric in _METRICS.items()
            if found[name] is not None
        ]
    card = ModelCardData(
        license=_licence_of_all(licences),
        library_name="rlrag",
        pipeline_tag="question-answering",
        base_model=[hub_id for name in models if (hub_id := _hub_id(name))] or None,
        datasets=list(dict.fromkeys(_short(name).split(":")[0] for name in data)),
        metrics=list(_METRICS.values()),
        model_name=title if results else None,
        eval_results=results or None,
        tags=["retrieval-augmented-generation", *config.algorithm.parts],
    )
    text: str = card.to_yaml()
    return text


def _licence_of_all(licences: Sequence[PartLicence]) -> str:
    """The one licence of all models; `unknown` where one is, and `other` where they differ."""
    names = {each.licence for each in licences if each.part != "corpus"}
    if UNKNOWN in names:
        return UNKNOWN
    return names.pop() if len(names) == 1 else "other"


def _results(config: RunConfig, evaluation: Mapping[str, Any] | None) -> list[str]:
    if evaluation is None:
        return ["These weights were not evaluated.", ""]
    return [
        "## Results",
        "",
        f"{evaluation['num_questions']} questions (`{_short(config.data.eval_questions)}`); 95 % "
        "intervals in brackets.",
        "",
        "| system | exact match | F1 | answer contained |",
        "|---|---|---|---|",
        *(
            f"| {name} | {_with_interval(found, 'em')} | {_with_interval(found, 'f1')} | "
            f"{'-' if found['accuracy'] is None else format(found['accuracy'], '.3f')} |"
            for name, found in evaluation["systems"].items()
        ),
        "",
    ]


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    if found[name] is None:
        return "-"
    low, high = found[f"{name}_ci95"]
    return f"{found[name]:.3f} ({low:.3f} to {high:.3f})"


def _use(has_adapter: bool) -> list[str]:
    adapter = (
        "`generator/` is the merged model, which is served; `adapter/` is its LoRA adapter alone, "
        "for peft."
    )
    return [
        "## Use",
        "",
        "In a checkout of rlrag; every file is compared with its hash in `manifest.json`:",
        "",
        "```bash",
        "hf download OWNER/NAME --local-dir bundle",
        "serve run serve.app:build bundle=bundle",
        "```",
        "",
        "```python",
        "from pathlib import Path",
        "from rlrag.bundle import load_bundle",
        'bundle = load_bundle(Path("bundle"))',
        "```",
        "",
        *([adapter, ""] if has_adapter else []),
    ]


def _own_system(evaluation: Mapping[str, Any] | None) -> str | None:
    """The line of the comparison that tells of this bundle."""
    systems = (evaluation or {}).get("systems", {})
    return next((name for name in _SYSTEMS if name in systems), None)


def _hub_id(name: str) -> str | None:
    """Where a model can be found by others; None for a directory."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name in _HUB_IDS:
        return _HUB_IDS[name]
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name and not Path(name).expanduser().exists() else None


def _short(name: str) -> str:
    """A source or model without its folders and file endings; a hub id stays as it is."""
    if name.startswith(_HUB_PREFIX):
        return name.removeprefix(_HUB_PREFIX).split(":")[0]
    if _hub_id(name) is not None:
        return name
    return Path(name).name.split(".jsonl")[0]
