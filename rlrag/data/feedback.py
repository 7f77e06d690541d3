"""SQLite store of served selections and the feedback on their answers.

One SQLite file, to which several processes may append at once. A selection is one row of
`selections`, every word about its answer one row of `feedback`; no row is ever changed. Old rows
are deleted a few at a time, as selections come in (`FeedbackStore`). A local disk is faster than a
network file system, which must keep locks (`rlrag.files.sqlite.Journal`).

The propensity of a selection is the probability with which this very selection was drawn. Without
it a log says nothing about another policy; it cannot be computed afterwards, since the policy that
drew is gone by then.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from rlrag.data.feedback_file import (
    OpenFile,
    close_for_good,
    explaining,
    identity,
    make_private,
    missing_columns,
    open_to_write,
    reading,
)
from rlrag.data.lines import checked_text
from rlrag.errors import DataError

Thumbs = Literal["up", "down"]
Value = TypeVar("Value")

_TRIM_EVERY = 100
_TRIMMED_AT_ONCE = 500
_SECONDS_A_DAY = 86_400.0
_ROUNDING = 1e-6
_MAX_WORDS = 16
_THUMBS_REWARD = {"up": 1.0, "down": 0.0}

MAX_REWARD = 1_000.0
"""Largest magnitude of a reward in a log: room for any scale that people rate on. The service takes
rewards from -1 to 1."""

_COLUMNS = (
    "request_id, time_s, version, question, candidate_ids, positions, propensity_logp, explored, "
    "answer, answer_logp, action_logps, num_selected"
)


@dataclass(frozen=True, slots=True)
class SelectionEvent:
    """One request that was answered.

    `actions` are what the policy did: positions in `candidate_ids` that it picked, in order, and
    their number where it stopped before it had to. `propensity_logp` is the log-probability, in
    nats, with which this very selection was drawn, exploration included; 0 where nothing was left
    to chance. `answer_logp` is the answer's own, in nats, None where the generator does not give
    it. `time_s` counts from the Unix epoch.

    Where episodes look further than the candidates, `actions` are those of the environment, and
    with `num_selected`, the most picks that were allowed, they can be played again. `action_logps`
    then has the log-probability with which each action was drawn after those before it; they sum to
    `propensity_logp`. Both are None else.
    """

    request_id: str
    time_s: float
    version: str
    question: str
    candidate_ids: tuple[str, ...]
    actions: tuple[int, ...]
    propensity_logp: float
    explored: bool
    answer: str
    answer_logp: float | None
    action_logps: tuple[float, ...] | None = None
    num_selected: int | None = None


@dataclass(frozen=True, slots=True)
class LoggedSelection:
    """A selection with the last word about its answer.

    `reward` is the number that was given, 1 for a thumb up and 0 for one down; it is None where
    golden answers were given instead, against which the answer is still to be compared.
    """

    event: SelectionEvent
    reward: float | None
    golden_answers: tuple[str, ...] | None


class FeedbackStore:
    """Appends to one SQLite file; safe for many processes and threads at once.

    It keeps one connection open, as the last one that closes waits until everything is on disk: a
    row takes a fraction of a millisecond. A copy for another process opens its own; a fork must
    not use its parent's. No call waits longer than ten seconds for another process. A file that is
    moved away is begun anew.

    Every hundred selections, what is beyond the bounds is deleted, oldest first and at most 500
    selections at a time. So a file can be a hundred selections larger than the bounds for each
    process that writes. A selection with feedback goes only for its age, or when there are more
    than `max_rows` of its kind, so that no flood of requests can drive it out. What is deleted is
    overwritten with zeros.
    """

    def __init__(self, path: Path, max_rows: int = 1_000_000, max_days: float = 90.0) -> None:
        """Create the file when it is missing.

        Args:
            path: The file; its folder is created too.
            max_rows: Selections without feedback that are kept, and as many with it.
            max_days: Age in days up to which they are kept.

        Raises:
            DataError: when the file cannot be used, is of another format or holds something else.
        """
        self._path = path.expanduser()
        self._max_rows = max_rows
        self._max_days = max_days
        self._until_trim = 0
        self._rated_up_to = 0  # all selections up to this number that are left have feedback
        self._lock = threading.Lock()
        self._open: OpenFile | None = None
        with self._connection():
            pass

    def __reduce__(self) -> tuple[type[FeedbackStore], tuple[Path, int, float]]:
        return FeedbackStore, (self._path, self._max_rows, self._max_days)

    def close(self) -> None:
        """Let go of the file; a later call opens it again."""
        with self._lock:
            if self._open is not None:
                close_for_good(self._open.connection)
                self._open = None

    def record_selection(self, event: SelectionEvent) -> bool:
        """Store a selection; False when its request id is taken, and then nothing is stored.

        Raises:
            DataError: when the selection is impossible or the file cannot be used.
        """
        _check_event(event)
        values = (
            event.request_id,
            event.time_s,
            event.version,
            event.question,
            json.dumps(event.candidate_ids),
            json.dumps(event.actions),
            min(event.propensity_logp, 0.0),
            int(event.explored),
            event.answer,
            event.answer_logp,
            None if event.action_logps is None else json.dumps(event.action_logps),
            event.num_selected,
        )
        marks = ", ".join("?" * len(values))
        with self._connection() as connection:
            with connection:
                added = connection.execute(
                    f"INSERT OR IGNORE INTO selections ({_COLUMNS}) VALUES ({marks})", values
                ).rowcount
            if self._until_trim <= 0:
                self._until_trim = _TRIM_EVERY
                self._trim(connection)
        self._until_trim -= 1
        return bool(added)

    def record_feedback(
        self,
        request_id: str,
        reward: float | None = None,
        golden_answers: Sequence[str] | None = None,
        thumbs: Thumbs | None = None,
    ) -> bool:
        """Store what an answer was worth; False when no selection has this request id.

        Of what is said about an answer the last 16 words are kept, and the last one counts.

        Args:
            request_id: The request that was answered.
            reward: At most `MAX_REWARD` in magnitude; higher is better.
            golden_answers: Right answers; none means that the question has no answer.
            thumbs: `up` or `down`.

        Raises:
            DataError: when not exactly one of the three is given, or it is not what it should be,
                or the file cannot be used.
        """
        _check_feedback(reward, golden_answers, thumbs)
        golden = None if golden_answers is None else json.dumps(list(golden_answers))
        with self._connection() as connection, connection:
            # One statement, so that the selection cannot be deleted between look-up and insertion.
            added = connection.execute(
                "INSERT INTO feedback (request_id, time_s, reward, golden_answers, thumbs) "
                "SELECT request_id, ?, ?, ?, ? FROM selections WHERE request_id = ?",
                (time.time(), reward, golden, thumbs, request_id),
            ).rowcount
            connection.execute(
                "DELETE FROM feedback WHERE request_id = ? AND number NOT IN (SELECT number FROM "
                "feedback WHERE request_id = ? ORDER BY number DESC LIMIT ?)",
                (request_id, request_id, _MAX_WORDS),
            )
        return bool(added)

    def _trim(self, connection: sqlite3.Connection) -> None:
        """Delete a bounded number of the oldest selections that are beyond the bounds."""
        [(newest,)] = connection.execute("SELECT MAX(number) FROM selections")
        rated = "EXISTS (SELECT 1 FROM feedback f WHERE f.request_id = selections.request_id)"
        last = (newest or 0) - self._max_rows
        num_deleted = self._delete(
            connection,
            f"number > ? AND number <= ? AND NOT {rated} ORDER BY number",
            (self._rated_up_to, last),
        )
        self._delete(
            connection,
            "time_s < ? ORDER BY time_s",
            (time.time() - self._max_days * _SECONDS_A_DAY,),
        )
        if num_deleted == _TRIMMED_AT_ONCE:
            return
        self._rated_up_to = max(self._rated_up_to, last)
        [(num_left,)] = connection.execute("SELECT COUNT(*) FROM selections")
        excess = num_left - 2 * self._max_rows
        if excess > 0:
            self._delete(connection, "number <= ? ORDER BY number", (last,), excess)

    @staticmethod
    def _delete(
        connection: sqlite3.Connection,
        which: str,
        values: tuple[float, ...],
        most: int = _TRIMMED_AT_ONCE,
    ) -> int:
        """Delete some of the selections, with their feedback; how many it were."""
        with connection:
            rows = connection.execute(
                "DELETE FROM selections WHERE number IN (SELECT number FROM selections WHERE "
                f"{which} LIMIT ?) RETURNING request_id",
                (*values, min(most, _TRIMMED_AT_ONCE)),
            ).fetchall()
            connection.executemany("DELETE FROM feedback WHERE request_id = ?", rows)
        return len(rows)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock, explaining(self._path):
            if self._open is not None and self._open.identity != identity(self._path):
                self._let_go()
            if self._open is None:
                self._open = open_to_write(self._path)
            try:
                yield self._open.connection
            except sqlite3.Error:
                self._let_go()
                raise

    def _let_go(self) -> None:
        if self._open is not None:
            self._open.connection.close()
            self._open, self._rated_up_to = None, 0


def read_feedback(path: Path) -> list[LoggedSelection]:
    """Every selection about which something was said, in the order in which they were stored.

    The file may be written to meanwhile; what is read is its content at one moment.

    Raises:
        DataError: when the file is missing, damaged, of another format or holds something else.
    """
    with reading(path) as connection:
        lacks = missing_columns(connection)
        names = ["NULL" if name in lacks else f"s.{name}" for name in _COLUMNS.split(", ")]
        query = (
            f"SELECT {', '.join(names)}, f.reward, "
            "f.golden_answers, f.thumbs FROM selections s JOIN feedback f ON f.number = "
            "(SELECT MAX(number) FROM feedback WHERE request_id = s.request_id) ORDER BY s.number"
        )
        return [_logged(row, path) for row in connection.execute(query)]


def count_selections(path: Path) -> int:
    """Selections in the file, whether or not something was said about them.

    Raises:
        DataError: as `read_feedback`.
    """
    with reading(path) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM selections").fetchone()[0])


def copy_feedback(path: Path, target: Path) -> None:
    """Write the file's content at one moment to `target`, which appears whole or not at all.

    Raises:
        DataError: as `read_feedback`, or when `target` cannot be written.
    """
    staging = target.with_name(f".{target.name}.new")
    try:
        staging.unlink(missing_ok=True)
        make_private(staging)
        with (
            reading(path) as connection,
            explaining(target),
            closing(sqlite3.connect(staging)) as copy,
        ):
            connection.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        staging.replace(target)
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        with suppress(OSError):  # it has become the target, or there is no such folder
            staging.unlink()


def _check_event(event: SelectionEvent) -> None:
    place = f"selection {event.request_id!r}"
    if not event.request_id or not event.question.strip():
        raise DataError(f"{place} has an empty request id or question; give both")
    for text in (event.request_id, event.version, event.question, event.answer):
        checked_text(text, place)
    if event.action_logps is None:
        _check_picks(event, place)
    else:
        _check_path(event, event.action_logps, place)
    if not math.isfinite(event.propensity_logp) or event.propensity_logp > _ROUNDING:
        raise DataError(
            f"{place} has propensity_logp {event.propensity_logp}; give the logarithm of a "
            "probability above 0"
        )
    if not all(map(math.isfinite, (event.answer_logp or 0.0, event.time_s))):
        raise DataError(
            f"{place} has answer_logp {event.answer_logp} and time_s {event.time_s}; give finite "
            "numbers"
        )


def _check_picks(event: SelectionEvent, place: str) -> None:
    num_candidates = len(event.candidate_ids)
    picks = event.actions[:-1] if num_candidates in event.actions[-1:] else event.actions
    inside = all(0 <= position < num_candidates for position in picks)
    if not event.actions or not inside or len(set(picks)) < len(picks):
        raise DataError(
            f"{place} has actions {event.actions} among {num_candidates} candidates; give "
            f"distinct candidate positions from 0, and {num_candidates} at the end for a stop"
        )


def _check_path(event: SelectionEvent, logps: tuple[float, ...], place: str) -> None:
    if not event.actions or min(event.actions) < 0 or (event.num_selected or 0) < 1:
        raise DataError(
            f"{place} has actions {event.actions} and num_selected {event.num_selected}; give the "
            "actions of its path, from 0, and the most picks that were allowed, from 1"
        )
    fits = len(logps) == len(event.actions) and all(logp <= _ROUNDING for logp in logps)
    if not fits or abs(sum(logps) - event.propensity_logp) > _ROUNDING * len(logps):
        raise DataError(
            f"{place} has {len(event.actions)} actions, action_logps {logps} and propensity_logp "
            f"{event.propensity_logp}; give a log-probability for each action, which sum to it"
        )


def _check_feedback(
    reward: float | None, golden_answers: Sequence[str] | None, thumbs: str | None
) -> None:
    given = [value for value in (reward, golden_answers, thumbs) if value is not None]
    if len(given) != 1:
        raise DataError(
            f"feedback has {len(given)} of reward, golden_answers and thumbs; give exactly one"
        )
    if reward is not None and not abs(reward) <= MAX_REWARD:  # NaN too
        raise DataError(
            f"the reward is {reward}; give a number from -{MAX_REWARD:g} to {MAX_REWARD:g}"
        )
    if thumbs is not None and thumbs not in _THUMBS_REWARD:
        raise DataError(f"thumbs is {thumbs!r}; give 'up' or 'down'")
    if isinstance(golden_answers, str):
        raise DataError(f"golden_answers is the text {golden_answers!r}; give a list of strings")
    for answer in golden_answers or ():
        checked_text(answer, "a golden answer")


def _logged(row: tuple, path: Path) -> LoggedSelection:
    request_id, *others = row
    try:
        time_s, version, question, ids, positions, propensity, explored, answer, logp = others[:9]
        action_logps, num_selected, reward, golden, thumbs = others[9:]
        event = SelectionEvent(
            request_id,
            time_s,
            version,
            question,
            _list_of(str, ids),
            _list_of(int, positions),
            propensity,
            bool(explored),
            answer,
            logp,
            None if action_logps is None else _list_of(float, action_logps),
            num_selected,
        )
        _check_event(event)
        golden_answers = None if golden is None else _list_of(str, golden)
        _check_feedback(reward, golden_answers, thumbs)
    except (ValueError, TypeError, AttributeError) as error:  # DataError is a ValueError
        raise DataError(
            f"{path}: the record of request {request_id!r} is damaged ({error}); delete it, or "
            "start a new file"
        ) from error
    return LoggedSelection(event, _THUMBS_REWARD[thumbs] if thumbs else reward, golden_answers)


def _list_of(kind: Callable[..., Value], text: str) -> tuple[Value, ...]:
    values = json.loads(text)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ValueError(f"{text[:40]!r} is not a list of {getattr(kind, '__name__', kind)}")
    return tuple(values)
