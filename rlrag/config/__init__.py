"""The configuration of a run: typed, frozen, validated, importable without torch.

A recipe returns one `RunConfig`. Every field is a command-line flag (`--algorithm.num-samples 8`)
and a key of the saved `config.json`, which loads back to an equal object. Nothing that a run finds
out is written here.
"""

from rlrag.config.algorithm import (
    ALGORITHMS,
    Algorithm,
    AlternatingConfig,
    DROConfig,
    FeedbackConfig,
    JSAConfig,
    OpenRAGConfig,
    OwnTrainerConfig,
    Part,
    SFTConfig,
    algorithm_kind,
)
from rlrag.config.run import RunConfig, describe_validation_error
from rlrag.config.sections import (
    BETTER_GENERATOR,
    BUILTIN_CORPUS,
    BUILTIN_ENCODER,
    BUILTIN_GENERATOR,
    BUILTIN_MODELS,
    BUILTIN_VOCABULARY_ENCODER,
    HOPS,
    SELECTION,
    DataConfig,
    EnvironmentConfig,
    FewShotExample,
    GeneratorConfig,
    HopSettings,
    JudgeConfig,
    PromptConfig,
    RetrievalConfig,
    RewardConfig,
    SelectorConfig,
)
from rlrag.config.training import (
    EvaluationConfig,
    GeneratorTrainingConfig,
    MirrorConfig,
    System,
    TrainingConfig,
)

DATA_DIR_VARIABLE = "RLRAG_DATA_DIR"
"""The environment variable that names the folder of the data sets which recipes train on."""

__all__ = [
    "ALGORITHMS",
    "BETTER_GENERATOR",
    "BUILTIN_CORPUS",
    "BUILTIN_ENCODER",
    "BUILTIN_GENERATOR",
    "BUILTIN_MODELS",
    "BUILTIN_VOCABULARY_ENCODER",
    "DATA_DIR_VARIABLE",
    "HOPS",
    "SELECTION",
    "Algorithm",
    "AlternatingConfig",
    "DROConfig",
    "DataConfig",
    "EnvironmentConfig",
    "EvaluationConfig",
    "FeedbackConfig",
    "FewShotExample",
    "GeneratorConfig",
    "GeneratorTrainingConfig",
    "HopSettings",
    "JSAConfig",
    "JudgeConfig",
    "MirrorConfig",
    "OpenRAGConfig",
    "OwnTrainerConfig",
    "Part",
    "PromptConfig",
    "RetrievalConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "SelectorConfig",
    "System",
    "TrainingConfig",
    "algorithm_kind",
    "describe_validation_error",
]
