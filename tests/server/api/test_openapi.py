# SPDX-License-Identifier: Apache-2.0
"""Schemathesis over our part of the OpenAPI schema: no 5xx, no answer the schema does not allow.

`SCHEMATHESIS_EXAMPLES` sets the cases of each test; 500 make 2,000 in all.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings

from vllm_eigen.server.launch.process import ServerProcess

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "60"))
PATHS = ("/v1/kv_cache", "/v1/kv_cache/history", "/v1/kv_cache/stream")


@pytest.fixture
def ours(plain: ServerProcess):  # type: ignore[no-untyped-def]
    schema = schemathesis.openapi.from_url(f"{plain.url}/openapi.json", wait_for_schema=5)
    return schema.include(path_regex=r"^/v1/kv_cache")


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (PATHS[0], "positive"),  # takes no input that could be wrong
        (PATHS[1], "positive"),
        (PATHS[1], "negative"),
        (PATHS[2], "positive"),
        (PATHS[2], "negative"),
    ],
)
def test_answers_keep_to_the_schema(ours, path: str, mode: str) -> None:  # type: ignore[no-untyped-def]
    modes = schemathesis.GenerationMode
    strategy = ours[path]["GET"].as_strategy(
        generation_mode=modes.POSITIVE if mode == "positive" else modes.NEGATIVE
    )

    @given(case=strategy)
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def check(case) -> None:  # type: ignore[no-untyped-def]
        if path.endswith("/stream") and _endless(case.query):
            case.query = {**case.query, "limit": 1}
        case.call_and_validate(timeout=20)

    check()


def test_schema_lists_our_routes_and_models(ours) -> None:  # type: ignore[no-untyped-def]
    raw = ours.raw_schema
    assert {path for path in raw["paths"] if path.startswith("/v1/kv_cache")} == set(PATHS)
    assert {"KVCache", "History", "Sample", "LayerCache"} <= set(raw["components"]["schemas"])


def _endless(query: object) -> bool:
    """Whether a stream asked for like this would outlast the test."""
    if not isinstance(query, dict):
        return False
    limit = query.get("limit")
    return limit is None or (isinstance(limit, int) and limit > 1)
