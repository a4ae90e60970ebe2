"""Requests that nobody would write, made from the API's own description.

Whatever comes, the answer is of a status, a kind and a shape that `/openapi.json` names, and never
a 5xx but 503 with Retry-After.
"""

import functools
import itertools
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.http.app import build_app
from cluster.http.settings import Settings
from tests.fake_backend import FakeBackend

CHECKS = [
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
    content_type_conformance,
]
CAMPAIGN_CASES = 10_000
EVERYDAY_CASES = 300
FAST = Settings(names=("m", "team/m"), keep_alive_s=0.01, progress_s=0.005, first_wait_s=0.01)


@functools.cache
def operations() -> list[Any]:
    """Return the operations of one app, which serves all tests here."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", build_app(FakeBackend(), FAST))
    found: list[Any] = list(schema.get_all_operations())
    return [each.ok() for each in found]


def fuzz(operation: Any, cases: int) -> int:
    """Send so many cases of one operation, and return how many were sent."""
    sent = itertools.count()

    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy() | operation.as_strategy(NEGATIVE))
    def send(case: Any) -> None:
        next(sent)
        response = case.call()
        if response.status_code >= 500:
            assert response.status_code == 503, response.text
            assert int(response.headers["retry-after"][0]) > 0
        case.validate_response(response, checks=CHECKS)

    send()
    return next(sent)


NEGATIVE = schemathesis.GenerationMode.NEGATIVE


def shared_out(cases: int) -> list[tuple[Any, int]]:
    """Return how many cases each operation gets: those without a body need few."""
    bodies = [each for each in operations() if each.body]
    few = cases // 100
    rest = cases - few * (len(operations()) - len(bodies))
    return [(each, -(-rest // len(bodies)) if each.body else few) for each in operations()]


def test_no_request_breaks_the_api() -> None:
    for operation, cases in shared_out(EVERYDAY_CASES):
        fuzz(operation, cases)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_ten_thousand_requests() -> None:
    sent = {each.label: fuzz(each, cases) for each, cases in shared_out(CAMPAIGN_CASES)}
    print(f"\n{sum(sent.values())} requests: {sent}")
