"""Writes selections and feedback to the feedback store in the background."""

from __future__ import annotations

import asyncio
import logging
import random
from concurrent.futures import Future, ThreadPoolExecutor

from rlrag.data.feedback import FeedbackStore, SelectionEvent, Thumbs
from rlrag.errors import OverloadedError
from rlrag.serving.http.metrics import Metrics

_MAX_PENDING = 1000
_LOG = logging.getLogger("rlrag.serve")


class FeedbackLog:
    """Writes one row after the other in a thread of its own.

    Feedback thus always comes after the selection that it is about. A selection that finds too many
    others waiting, cannot be written, or has the id of an earlier one is left out and counted: an
    answer is worth more than its record.

    Args:
        store: Where the rows go.
        explore_share: Part of the answers whose selection is drawn from the policy.
        metrics: Counts what is left out.
    """

    def __init__(self, store: FeedbackStore, explore_share: float, metrics: Metrics) -> None:
        self._store = store
        self._explore_share = explore_share
        self._metrics = metrics
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self._num_pending = 0

    def draws_to_explore(self) -> bool:
        """Whether the next selection is drawn from the policy in place of its best one."""
        return random.random() < self._explore_share

    def record_selection(self, event: SelectionEvent) -> None:
        """Write a selection soon."""
        if self._num_pending >= _MAX_PENDING:
            self._metrics.unlogged()
            return
        self._num_pending += 1
        written = self._writer.submit(self._store.record_selection, event)
        asyncio.wrap_future(written).add_done_callback(self._written)

    def _written(self, written: asyncio.Future[bool]) -> None:
        self._num_pending -= 1
        error = None if written.cancelled() else written.exception()
        if error is not None:
            _LOG.error("a selection could not be recorded", exc_info=error)
        if error is not None or written.cancelled() or not written.result():
            self._metrics.unlogged()

    async def record_feedback(
        self,
        request_id: str,
        reward: float | None,
        golden_answers: list[str] | None,
        thumbs: Thumbs | None,
    ) -> bool:
        """Write what an answer was worth; False when the request is unknown.

        Raises:
            OverloadedError: when too much waits to be written.
        """
        if self._num_pending >= _MAX_PENDING:
            raise OverloadedError(
                "too much feedback is waiting to be written; try again in a moment"
            )
        self._num_pending += 1
        written: Future[bool] = self._writer.submit(
            self._store.record_feedback,
            request_id,
            reward=reward,
            golden_answers=golden_answers,
            thumbs=thumbs,
        )
        try:
            return await asyncio.wrap_future(written)
        finally:
            self._num_pending -= 1

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.shutdown(wait=True)
        self._store.close()
