"""Exceptions of the package, all subclasses of `RlragError`.

One root, `RlragError`. Each child is also the standard class it specialises, so that callers may
catch either. No class has an `__init__` of its own: an exception with one message argument crosses
a Ray actor boundary unchanged.
"""

import difflib
from collections.abc import Iterable
from typing import Self


class RlragError(Exception):
    """Root of all errors of this package; its message says what is wrong and what to do."""


class ConfigError(RlragError, ValueError):
    """A configuration value is unknown, out of range or contradicts another."""


class DataError(RlragError, ValueError):
    """A corpus or question file is malformed, empty or inconsistent."""


class ModelNotFoundError(RlragError, FileNotFoundError):
    """A model is neither a local path, nor an installed model package, nor reachable on a hub."""


class IndexMismatchError(RlragError, ValueError):
    """An index on disk was built from another corpus, encoder or parameters."""


class RetrievalError(RlragError, RuntimeError):
    """A retriever, or a part of an index that is searched elsewhere, failed or did not answer."""


class PromptTooLongError(RlragError, ValueError):
    """A question with its few-shot examples leaves no room within the model's context."""


class GenerationError(RlragError, RuntimeError):
    """A generator failed, returned something unusable or can no longer be restarted."""


class GeneratorTimeoutError(GenerationError, TimeoutError):
    """A generator did not answer within the configured time."""


class RewardError(RlragError, RuntimeError):
    """A reward function raised, returned something that is not a finite number, or hung."""


class EpisodeError(RlragError, RuntimeError):
    """An environment or policy breaks its contract, or raises in the middle of an episode."""


class TrainerError(RlragError, RuntimeError):
    """A trainer of somebody's own breaks its contract, or raises in the middle of a step."""


class NonFiniteLossError(RlragError, FloatingPointError):
    """A loss or gradient is NaN or infinite; the run ends rather than train on it."""


class CheckpointError(RlragError, RuntimeError):
    """A checkpoint or bundle is truncated, altered or belongs to another configuration."""


class PreemptedError(RlragError, RuntimeError):
    """A run was asked to end, by SIGTERM, and can be continued from what it left."""


class RunDirectoryError(RlragError, FileExistsError):
    """A run directory already belongs to another configuration."""


class InUseError(RlragError, BlockingIOError):
    """Another process writes to the same place."""


class SetupError(RlragError, EnvironmentError):
    """Something the machine must provide is missing: a compiler, a package, disk space."""


class RequestError(RlragError, ValueError):
    """A request to a served pipeline cannot be answered as it was asked.

    Attributes:
        field: The field that the message begins with, where one field is wrong.
    """

    field: str | None = None

    @classmethod
    def about(cls, field: str, what: str) -> Self:
        """An error whose message is `FIELD WHAT`.

        Example:
            >>> error = RequestError.about("num_candidates", "is 0; give 1 or more")
            >>> str(error), error.field
            ('num_candidates is 0; give 1 or more', 'num_candidates')
        """
        error = cls(f"{field} {what}")
        error.field = field
        return error


class OverloadedError(RlragError, RuntimeError):
    """A served pipeline has no room for a request now, or a part of it is restarting."""


def nearest_name(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about an unknown name: the nearest known one, else `otherwise`.

    Example:
        >>> nearest_name("bm52", ["bm25", "dense"], "there are: bm25, dense")
        "did you mean 'bm25'?"
        >>> nearest_name("xyz", ["bm25", "dense"], "there are: bm25, dense")
        'there are: bm25, dense'
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise
