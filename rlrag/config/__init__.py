"""The configuration of a run: typed, frozen, validated, importable without torch.

A recipe returns one `RunConfig`. Every field is a command-line flag (`--dro.num-samples 8`) and a
key of the saved `config.json`, which loads back to an equal object. Nothing that a run finds out is
written here.
"""

from rlrag.config.run import RunConfig, describe_validation_error
from rlrag.config.sections import (
    BETTER_GENERATOR,
    BUILTIN_CORPUS,
    BUILTIN_ENCODER,
    BUILTIN_GENERATOR,
    BUILTIN_MODELS,
    BUILTIN_VOCABULARY_ENCODER,
    DataConfig,
    EnvironmentConfig,
    FewShotExample,
    GeneratorConfig,
    JudgeConfig,
    PromptConfig,
    RetrievalConfig,
    RewardConfig,
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

DATA_DIR_VARIABLE = "RLRAG_DATA_DIR"
"""The environment variable that names the folder of the data sets which recipes train on."""

__all__ = [
    "BETTER_GENERATOR",
    "BUILTIN_CORPUS",
    "BUILTIN_ENCODER",
    "BUILTIN_GENERATOR",
    "BUILTIN_MODELS",
    "BUILTIN_VOCABULARY_ENCODER",
    "DATA_DIR_VARIABLE",
    "DROConfig",
    "DataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "FewShotExample",
    "GeneratorConfig",
    "GeneratorTrainingConfig",
    "JSAConfig",
    "JudgeConfig",
    "MirrorConfig",
    "OffPolicyConfig",
    "OpenRAGConfig",
    "PromptConfig",
    "RetrievalConfig",
    "RewardConfig",
    "RunConfig",
    "SelectorConfig",
    "System",
    "TrainingConfig",
    "describe_validation_error",
]
