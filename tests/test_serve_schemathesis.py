"""Generated requests against the OpenAPI document: no server error, nothing undocumented."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis import Case
from schemathesis.checks import CheckContext
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.engine import Status, events, from_schema
from serve_stand_ins import Served

from rlrag.data.feedback import FeedbackStore, SelectionEvent
from rlrag.serving.http.schemas import EXAMPLE_ID
from rlrag.serving.records import Routing

NUM_CASES = 2000
NUM_EXAMPLES = 50  # of an operation in one phase; there are some 20 operations and several phases
KEY = "schemathesis-key"


@schemathesis.check
def valid_data_is_not_called_wrong(
    context: CheckContext, response: Response, case: Case
) -> bool | None:
    """A request that fits the document is never told that a field of it is wrong."""
    if case.meta is not None and case.meta.generation.mode.is_positive:
        problem = response.json() if response.status_code in (400, 422) else {}
        kinds = ("urn:rlrag:invalid", "urn:rlrag:malformed")
        assert problem.get("type") not in kinds, problem["detail"]
    return None


def configured(num_examples: int) -> SchemathesisConfig:
    """All checks, with one exception that the check above makes good.

    The document cannot say what a bundle holds: a 422 of that kind is right for valid data. Nor can
    it say which names are known, which is what 404 tells.
    """
    return SchemathesisConfig.from_dict(
        {
            "headers": {"Authorization": f"Bearer {KEY}"},
            "continue-on-failure": True,
            "generation": {
                "max-examples": num_examples,
                "deterministic": True,
                "database": "none",
            },
            "checks": {
                # A request may ask for less time than a busy machine needs; see below.
                "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "504"]},
                # A chat of several messages is refused with 400; see the check above.
                "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "422"]},
                # An array that is too long may make the whole body too long.
                "negative_data_rejection": {
                    "expected-statuses": ["400", "401", "403", "404", "405", "413", "415", "422"]
                },
            },
        }
    )


def served_document(folder: Path, num_examples: int) -> Any:
    """The document of a service with keys, feedback, a canary and a shadow."""
    (folder / "keys").write_text(KEY)
    store = FeedbackStore(folder / "feedback.db")
    # The answer that the document's example of feedback is about.
    store.record_selection(
        SelectionEvent(
            EXAMPLE_ID, time.time(), "v1", "what?", ("p1",), (0,), 0.0, False, "25", -1.0
        )
    )
    served = Served(
        Routing("v1", canary="v2", canary_share=0.5, shadow="v3"),
        store,
        access__keys_file=str(folder / "keys"),
        access__admin_keys_file=str(folder / "keys"),
        access__hosts=("testserver",),
    )
    return schemathesis.openapi.from_asgi(
        "/openapi.json", served.app, config=configured(num_examples)
    )


@pytest.mark.slow
def test_generated_requests_keep_to_the_document(tmp_path: Path) -> None:
    cases: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    failures: dict[str, str] = {}
    for event in from_schema(served_document(tmp_path, NUM_EXAMPLES)).execute():
        if isinstance(event, events.NonFatalError):
            failures[f"{event.label}: error"] = repr(event.value)
        if isinstance(event, events.FatalError):
            raise event.exception
        if not isinstance(event, events.ScenarioFinished):
            continue
        record = event.recorder
        cases[record.label] += len(record.cases)
        for case_id, interaction in record.interactions.items():
            if interaction.response is None:
                continue
            statuses[interaction.response.status_code] += 1
            if interaction.response.status_code == 504:
                assert record.cases[case_id].value.body["timeout_s"] < 5
        for case_id, checks in record.checks.items():
            for check in checks:
                if check.status is Status.FAILURE and check.failure_info is not None:
                    told = check.failure_info
                    name = f"{record.label}: {check.name}: {told.failure.title}"
                    failures[name] = f"{told.failure.message}\n{told.code_sample}\n{case_id}"
    assert not failures, "\n\n".join(f"{name}\n{told}" for name, told in failures.items())
    assert cases.total() >= NUM_CASES, cases
    assert {200, 202, 401, 404, 405, 422} <= set(statuses), statuses
