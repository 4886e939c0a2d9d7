"""Requests that schemathesis draws from the OpenAPI description: none breaks the gateway."""

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

SHARES = {
    "POST /v1/chat/completions": 0.2,
    "POST /v1/completions": 0.35,
    "POST /tokenize": 0.15,
    "POST /detokenize": 0.3,
}
"""The share of all requests that a call gets. The other calls take no body, so there is little to draw."""
VALID = 0.8
"""The share of requests that keep to the description. The others don't: a wrong type, a missing field."""
LEAST_ANSWERED = 0.2


def send(operation, base_url, *, mode, requests, answers):
    """Sends requests that are drawn from one operation; counts their statuses in ``answers``."""

    @settings(
        max_examples=requests,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def draw(case):
        answer = case.call(base_url=base_url)
        answers[answer.status_code] += 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"]

    draw()


@pytest.mark.parametrize(
    "requests", [pytest.param(500, marks=pytest.mark.heavy), pytest.param(10_000, marks=pytest.mark.soak)]
)
def test_requests_by_the_description(http, base_url, requests):
    http.engine.auto = (5, 6, 7)
    answers = Counter()
    for found in schemathesis.openapi.from_url(f"{base_url}/openapi.json").get_all_operations():
        operation = found.ok()
        share = round(requests * SHARES.get(operation.label, 0))
        valid = round(share * VALID) or 3
        send(operation, base_url, mode=GenerationMode.POSITIVE, requests=valid, answers=answers)
        if share:
            negative = share - valid
            send(operation, base_url, mode=GenerationMode.NEGATIVE, requests=negative, answers=answers)
    answered = sum(count for status, count in answers.items() if status < 300)
    assert sum(answers.values()) >= requests
    assert answered >= LEAST_ANSWERED * sum(answers.values()), answers
