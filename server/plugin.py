"""vLLM endpoint plugin: the project's routes on vLLM's own API server."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request

from server.figures import Figures, mean_usage
from server.schemas import KVCache
from vllm_eigen.errors import EngineError

LAYOUT_TIMEOUT = 30.0
"""Seconds to wait for the workers' layout."""

router = APIRouter(tags=["kv cache"])


@router.get("/v1/kv_cache", summary="KV cache as allocated and used")
async def kv_cache(request: Request) -> KVCache:
    """Pool, use, and bytes a token with and without compression, read from the engine."""
    figures: Figures | None = getattr(request.app.state, "eigen_figures", None)
    if figures is None:
        raise HTTPException(503, detail="the engine has not reported its KV cache")
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return figures.answer(mean_usage(get_prometheus_registry().collect()))


class KVCacheEndpoints:
    """Satisfies vLLM's `EndpointPlugin` protocol; entry point `eigen_kv_cache`."""

    name = "eigen_kv_cache"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Read the cache layout from the workers, once.

        Raises:
            EngineError: the workers lack our extension, or do not answer in time.
        """
        state.eigen_figures = None
        if engine_client is None:
            return
        try:
            ranks = await asyncio.wait_for(
                engine_client.collective_rpc("eigen_kv_layout"), timeout=LAYOUT_TIMEOUT
            )
        except TimeoutError as error:
            raise EngineError("the engine did not report its KV cache in time") from error
        config = engine_client.vllm_config
        state.eigen_figures = Figures(
            ranks,
            full_element_size=config.model_config.dtype.itemsize,
            num_engines=config.parallel_config.data_parallel_size,
        )
