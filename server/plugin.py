# SPDX-License-Identifier: Apache-2.0
"""vLLM endpoint plugin: the project's routes on vLLM's own API server.

Ties the room together: middleware and error shape from `http`, routes from `api`, and a `Monitor`
from `stats` that the routes find in `app.state.eigen_monitor`.
"""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException

from vllm_eigen.common.errors import EngineError
from vllm_eigen.server.api import dashboard, routes
from vllm_eigen.server.http import probes
from vllm_eigen.server.http.access import OPEN_BY_DEFAULT, AccessMiddleware
from vllm_eigen.server.http.drain import (
    DrainingEngineClient,
    DrainMiddleware,
    DrainState,
    bounded_shutdown,
)
from vllm_eigen.server.http.errors import http_exception_handler
from vllm_eigen.server.http.limits import MAX_BODY_BYTES, BodyLimitMiddleware
from vllm_eigen.server.stats.gauges import Gauges
from vllm_eigen.server.stats.layout import read_layout, summary
from vllm_eigen.server.stats.monitor import Monitor

logger = logging.getLogger("vllm.eigen")

OPEN_FLAG, BODY_FLAG = "open_routes", "max_body_size"
"""Where the parsed flags of `vllm-eigen serve` have them."""


class KVCacheEndpoints:
    """Satisfies vLLM's `EndpointPlugin` protocol; entry point `eigen_kv_cache`."""

    name = "eigen_kv_cache"
    required_tasks = None
    """The guards belong before every model, not only before those that generate."""

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, the guards, and OpenAI's shape for routing errors.

        What is added last is asked first: the key, then whether the server takes requests, then
        the size of the body.
        """
        args = getattr(app.state, "args", Namespace())
        app.include_router(routes.router)
        app.include_router(dashboard.router)
        app.include_router(probes.router)
        app.include_router(APIRouter(lifespan=bounded_shutdown))
        app.add_middleware(BodyLimitMiddleware, max_bytes=_given(args, BODY_FLAG, MAX_BODY_BYTES))
        app.state.eigen_drain = DrainState()
        app.add_middleware(DrainMiddleware, drain=app.state.eigen_drain)
        if keys := _keys(args):
            open_routes = _given(args, OPEN_FLAG, OPEN_BY_DEFAULT)
            app.add_middleware(AccessMiddleware, keys=keys, open_routes=open_routes)
        app.add_exception_handler(HTTPException, http_exception_handler)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read the cache layout from the workers, once, and begin to sample.

        An engine without such a layout still serves; our routes then answer 503 with the reason.
        """
        if engine_client is not None:
            state.engine_client = DrainingEngineClient(engine_client, state.eigen_drain)
        state.eigen_drain.serving = True
        try:
            layout = await read_layout(engine_client)
        except EngineError as error:
            logger.warning("no KV-cache statistics: %s", error)
            state.eigen_monitor = str(error)
            return
        names = args.served_model_name or [args.model]
        gauges = Gauges(names if isinstance(names, str) else names[0])
        state.eigen_monitor = Monitor(layout, publish=gauges.publish)
        state.eigen_monitor.start()
        if getattr(engine_client.vllm_config.parallel_config, "_api_process_rank", 0) <= 0:
            logger.info(summary(layout))


def _keys(args: Namespace) -> list[str]:
    """The API keys, from where vLLM takes them: `--api-key`, else the environment."""
    given = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    return [key for key in given if key]


def _given(args: Namespace, flag: str, default: Any) -> Any:
    """Value of a flag of `vllm-eigen serve`; vLLM's own command does not know it."""
    found = getattr(args, flag, None)
    return default if found is None else found
