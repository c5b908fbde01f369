"""vLLM endpoint plugin: the project's routes on vLLM's own API server."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from server import dashboard, routes
from server.drain import Drain, Draining, bound_shutdown
from server.errors import routing_error
from server.figures import Figures
from server.gauges import Gauges
from server.limits import BodyLimit
from server.monitor import Monitor
from server.units import counted, size
from vllm_eigen.errors import EngineError

logger = logging.getLogger("vllm.eigen")

LAYOUT_SECONDS = 30.0
"""How long to wait for the workers' layout."""


class KVCacheEndpoints:
    """Satisfies vLLM's `EndpointPlugin` protocol; entry point `eigen_kv_cache`."""

    name = "eigen_kv_cache"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, the bounds on request bodies, and OpenAI's shape for routing errors."""
        app.include_router(routes.router)
        app.include_router(dashboard.router)
        app.add_middleware(BodyLimit)
        app.state.eigen_drain = Drain()
        app.add_middleware(Draining, drain=app.state.eigen_drain)
        app.add_exception_handler(HTTPException, routing_error)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read the cache layout from the workers, once, and begin to sample.

        An engine without such a layout still serves; our routes then answer 503 and say why.
        """
        if engine_client is not None:
            state.eigen_drain.watch(engine_client)
        state.eigen_shutdown_bound = asyncio.create_task(bound_shutdown(state))
        try:
            figures = await _figures(engine_client)
        except EngineError as error:
            logger.warning("no KV-cache statistics: %s", error)
            state.eigen_monitor = str(error)
            return
        names = args.served_model_name or [args.model]
        gauges = Gauges(names if isinstance(names, str) else names[0])
        state.eigen_monitor = Monitor(figures, publish=gauges.publish)
        state.eigen_monitor.start()
        if getattr(engine_client.vllm_config.parallel_config, "_api_process_rank", 0) <= 0:
            logger.info(explain(figures))


def explain(figures: Figures) -> str:
    """What the pool holds, in one line."""
    ratio = figures.bytes_per_token / figures.full_bytes_per_token
    line = f"KV pool {size(figures.pool_bytes)} = {counted(figures.capacity)} tokens"
    if figures.bytes_per_token == figures.full_bytes_per_token:
        return f"{line}, uncompressed"
    without = counted(figures.uncompressed_capacity)
    return f"{line}; uncompressed it would hold {without} (KV ratio {ratio:.2f})"


async def _figures(engine_client: Any) -> Figures:
    """The layout of the engine's cache.

    Raises:
        EngineError: there is no engine, it keeps no statistics, or its workers do not answer.
    """
    if engine_client is None:
        raise EngineError("this server has no engine")
    if not getattr(engine_client, "log_stats", True):
        raise EngineError("statistics are switched off; start without --disable-log-stats")
    try:
        ranks = await asyncio.wait_for(
            engine_client.collective_rpc("eigen_kv_layout"), timeout=LAYOUT_SECONDS
        )
    except TimeoutError as error:
        raise EngineError("the engine did not report its KV cache in time") from error
    except Exception as error:
        raise EngineError(
            "the workers cannot report their KV cache; start with `vllm-eigen serve`, which adds "
            f"the worker extension ({type(error).__name__})"
        ) from error
    config = engine_client.vllm_config
    parallel = config.parallel_config
    return Figures(
        ranks,
        full_element_size=config.model_config.dtype.itemsize,
        max_model_len=config.model_config.max_model_len,
        pool_blocks=config.cache_config.num_gpu_blocks,
        block_size=config.cache_config.block_size,
        num_engines=parallel.data_parallel_size_local
        if parallel.local_engines_only
        else parallel.data_parallel_size,
    )
