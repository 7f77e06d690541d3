"""Writes logs as JSON lines.

Each line is one object:

    time        when it was said, in UTC
    level       DEBUG, INFO, WARNING, ERROR or CRITICAL
    logger      who said it
    run         name of the run
    step        the last recorded step that the process knows of, or null
    actor       `driver`, `worker-RANK` or `generator-NUMBER`
    message     what was said
    exception   the traceback that came with it, or null

Records with an attribute `fields`, a mapping, have what it holds besides. In a service `run` is
`serve`, and `actor` is its part with the name of the replica.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rlrag.errors import SetupError

logger = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One record, one object, one line."""

    def __init__(self, run: str, actor: str, step: int | None = None) -> None:
        super().__init__()
        self.step = step
        self._run = run
        self._actor = actor

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON in ASCII, so that nothing in a message can break its line."""
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        parts += [self.formatStack(record.stack_info)] if record.stack_info else []
        return json.dumps(
            {
                "time": datetime.fromtimestamp(record.created, UTC).isoformat(
                    timespec="milliseconds"
                ),
                "level": record.levelname,
                "logger": record.name,
                "run": self._run,
                "step": self.step,
                "actor": self._actor,
                "message": record.getMessage(),
                "exception": "\n".join(parts) or None,
                **getattr(record, "fields", {}),
            }
        )


class _LogFile(logging.FileHandler):
    """Says once, in one line on stderr, that nothing more can be written; work goes on."""

    _is_said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            self._say(error)
        else:  # a record that cannot be shown, which is a mistake of whoever logged it
            super().handleError(record)

    def close(self) -> None:
        """Close the file; what waits to be written to a full disk is lost."""
        try:
            super().close()
        except OSError as error:
            self._say(error)

    def _say(self, error: OSError) -> None:
        if not self._is_said:
            self._is_said = True
            reason = error.strerror or error
            print(
                f"warning: cannot write {self.baseFilename}: {reason}; what is logged is lost",
                file=sys.stderr,
                flush=True,
            )


def log_file(path: Path, run: str, actor: str, step: int | None = None) -> logging.FileHandler:
    """A handler that appends to a file, which it creates.

    Raises:
        SetupError: when it cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise SetupError(
            f"cannot write the log {path}: {error.strerror or error}; free disk space, or make "
            "the directory writable"
        ) from error
    handler.setFormatter(JsonLines(run, actor, step))
    return handler


def log_to_stderr(run: str, actor: str) -> None:
    """Let what this package says, from INFO on, go to the process's standard error for good.

    To the one that the process began with: a program that runs this one may have put another in
    its place, with a format of its own.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonLines(run, actor))
    ours = logging.getLogger("rlrag")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)


@contextmanager
def logging_to(handlers: Sequence[logging.Handler]) -> Iterator[None]:
    """Let everything that is logged or warned of in this process go to these handlers alone.

    They are closed at the end. An exception that ends the block is logged with its traceback.
    """
    with ExitStack() as stack:
        for handler in handlers:
            stack.callback(handler.close)
        for talker in _loggers_on_a_stream():
            _hand_over(talker, [], stack)
        root = logging.getLogger()
        stack.callback(root.setLevel, root.level)
        _hand_over(root, handlers, stack)
        root.setLevel(logging.INFO)
        stack.callback(logging.captureWarnings, False)
        logging.captureWarnings(True)
        try:
            yield
        except Exception as error:
            logger.exception("ended by %s", type(error).__name__)
            raise


def _loggers_on_a_stream() -> list[logging.Logger]:
    """Loggers below the root that write to the terminal by themselves."""
    return [
        logger
        for logger in list(logging.root.manager.loggerDict.values())  # other threads may add some
        if isinstance(logger, logging.Logger)
        and any(
            getattr(handler, "stream", None) is not None
            for handler in logger.handlers
            if not isinstance(handler, logging.FileHandler)
        )
    ]


def _hand_over(
    logger: logging.Logger, handlers: Sequence[logging.Handler], stack: ExitStack
) -> None:
    """Let a logger write to these handlers and its parents' until the stack unwinds."""
    stack.callback(setattr, logger, "handlers", logger.handlers)
    stack.callback(setattr, logger, "propagate", logger.propagate)
    logger.handlers, logger.propagate = list(handlers), True
