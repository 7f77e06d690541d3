"""What requests may hold, and what the OpenAPI document says of them."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import ValidationError
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR
from serve_stand_ins import Served, settings_of

from rlrag.serving.http.openai_schemas import ChatRequest
from rlrag.serving.http.problems import problem_of
from rlrag.serving.http.schemas import AnswerRequest, AnswersRequest, BundleRequest, FeedbackRequest
from rlrag.serving.service import filters_of


def document(**arguments: object) -> dict[str, Any]:
    return Served(**arguments).app.openapi()


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({}, ("question",)),
        ({"question": ""}, ("question",)),
        ({"question": " \n"}, ("question",)),
        ({"question": 7}, ("question",)),
        ({"question": "q", "num_selected": 0}, ("num_selected",)),
        ({"question": "q", "num_selected": "2"}, ("num_selected",)),
        ({"question": "q", "num_selected": True}, ("num_selected",)),
        ({"question": "q", "num_selected": 2.5}, ("num_selected",)),
        ({"question": "q", "num_candidates": 1.5}, ("num_candidates",)),
        ({"question": "q", "temperature": -0.1}, ("temperature",)),
        ({"question": "q", "temperature": math.nan}, ("temperature",)),
        ({"question": "q", "seed": -1}, ("seed",)),
        ({"question": "q", "seed": 2**53}, ("seed",)),
        ({"question": "q", "timeout_s": 0}, ("timeout_s",)),
        ({"question": "q", "filters": {"ids": [""]}}, ("filters", "ids", 0)),
        ({"question": "q", "filters": {"id": ["a"]}}, ("filters", "id")),
        ({"question": "q", "stream": 1}, ("stream",)),
        ({"question": "q", "top_k": 3}, ("top_k",)),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        AnswerRequest.model_validate(fields)
    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_whole_numbers_may_be_written_with_a_point() -> None:
    body = AnswerRequest.model_validate({"question": "q", "num_selected": 2.0, "seed": 3.0})
    assert (body.num_selected, body.seed) == (2, 3)
    assert isinstance(body.num_selected, int)


@pytest.mark.parametrize(
    "given_fields",
    [{"reward": 0.5}, {"reward": -1}, {"thumbs": "down"}, {"golden_answers": []}],
)
def test_feedback_takes_one_kind(given_fields: dict[str, Any]) -> None:
    body = FeedbackRequest.model_validate({"request_id": "r1", **given_fields})
    assert body.model_fields_set == {"request_id", *given_fields}


@pytest.mark.parametrize(
    "given_fields",
    [
        {},
        {"reward": 1.0, "thumbs": "up"},
        {"reward": None},
        {"reward": None, "thumbs": "up"},
        {"reward": math.inf},
        {"reward": 1.5},
        {"reward": -1e300},
        {"reward": math.nan},
        {"reward": "1"},
        {"thumbs": "sideways"},
        {"golden_answers": [" "]},
        {"golden_answers": "Paris"},
        {"golden_answers": None},
        {"golden_answers": ["a"] * 65},
    ],
)
def test_feedback_of_no_or_two_kinds_or_of_a_wrong_one_is_refused(
    given_fields: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError):
        FeedbackRequest.model_validate({"request_id": "r1", **given_fields})


def test_a_batch_has_a_question_and_a_role_is_known() -> None:
    with pytest.raises(ValidationError):
        AnswersRequest(questions=[])
    with pytest.raises(ValidationError):
        BundleRequest.model_validate({"path": "b", "role": "main"})
    with pytest.raises(ValidationError):
        BundleRequest.model_validate({"path": "b", "role": "canary", "share": 1.1})


def test_every_parameter_of_the_openai_client_is_followed_of_no_consequence_or_refused() -> None:
    schema = ChatRequest.model_json_schema()
    known = CompletionCreateParamsNonStreaming.__annotations__
    assert set(known) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    body = ChatRequest.model_validate(
        {"model": "rlrag", "messages": [{"role": "user", "content": "q"}], "top_k": 5}
    )
    assert body.unfollowed() == {"top_k": 5}


@given(st.lists(st.text(min_size=1), max_size=4))
def test_filters_are_equal_whatever_the_order_of_their_ids(ids: list[str]) -> None:
    one = AnswerRequest.model_validate({"question": "q", "filters": {"ids": ids}})
    other = AnswerRequest.model_validate({"question": "q", "filters": {"ids": ids[::-1] + ids}})
    assert filters_of(one.filters) == filters_of(other.filters)


def test_an_unknown_error_shows_nothing_of_itself() -> None:
    problem = problem_of(KeyError("password"), "r1")
    assert problem.status == 500
    assert "password" not in problem.model_dump_json()
    assert "r1" in problem.detail


def test_all_examples_are_valid() -> None:
    checked = 0
    for model in (AnswerRequest, AnswersRequest, BundleRequest, FeedbackRequest, ChatRequest):
        for example in model.model_json_schema()["examples"]:
            model.model_validate(example)
            checked += 1
    assert checked >= 6


def test_the_document_shows_the_bounds_of_the_settings() -> None:
    schemas = document(limits__max_question_chars=77, limits__max_candidates=9)["components"][
        "schemas"
    ]
    asked = schemas["AnswerRequest"]["properties"]
    assert asked["question"]["maxLength"] == 77
    assert asked["num_candidates"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 9}
    assert schemas["AnswersRequest"]["properties"]["questions"]["items"]["maxLength"] == 77
    assert schemas["FeedbackRequest"]["oneOf"] == [
        {"required": ["reward"]},
        {"required": ["golden_answers"]},
        {"required": ["thumbs"]},
    ]
    assert schemas["FeedbackRequest"]["properties"]["reward"]["type"] == "number"


def test_every_operation_documents_its_problems_and_its_keys(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k")
    paths = document(access__keys_file=str(keys))["paths"]
    for path, operations in paths.items():
        for operation in operations.values():
            assert operation["summary"]
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    assert list(response["content"]) == ["application/problem+json"]
            is_open = path in ("/healthz", "/readyz", "/metrics")
            assert ("security" in operation) == (not is_open)
    assert "security" not in document()["paths"]["/v1/answer"]["post"]


def test_the_document_is_complete_and_closed() -> None:
    found = document()
    text = json.dumps(found)
    for name in set(part.split('"')[0] for part in text.split("#/components/schemas/")[1:]):
        assert name in found["components"]["schemas"]
    assert "HTTPValidationError" not in text
    assert set(found["paths"]) == {
        "/v1/answer", "/v1/answers", "/v1/retrieve", "/retrieve", "/v1/chat/completions",
        "/v1/models", "/v1/models/{name}", "/v1/versions", "/v1/recent", "/v1/feedback",
        "/healthz", "/readyz", "/metrics", "/admin/bundle", "/admin/bundle/{role}",
        "/admin/versions", "/admin/compare",
    }  # fmt: skip


def test_the_document_is_valid_under_the_version_that_it_declares() -> None:
    found = document()
    assert found["openapi"].startswith("3.1.")
    OPENAPI_31_VALIDATOR.validate(found)
    with_a_later_keyword = found["paths"]["/healthz"]["get"]["responses"]["200"]["content"]
    with_a_later_keyword["application/json"]["itemSchema"] = {"type": "object"}
    with pytest.raises(jsonschema_rs.ValidationError):
        OPENAPI_31_VALIDATOR.validate(found)


def test_settings_name_the_bounds() -> None:
    limits = settings_of(limits__max_queries="5", limits__max_shadow_runs=0).limits
    assert (limits.max_queries, limits.max_shadow_runs) == (5, 0)
