# SPDX-License-Identifier: Apache-2.0
"""How soon a load balancer learns that a server shuts down: `/ready`, asked over and over."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_eigen.common.errors import EngineError

if TYPE_CHECKING:
    import httpx

PAUSE_SECONDS = 0.02
BEFORE_SECONDS = 1.0
"""Probes before the signal."""
SETTLED_SECONDS = 1.0
"""Probes after the first refusal: none may say that the server is ready."""
_AGO = re.compile(r"began to shut down ([\d.]+) s ago")


@dataclass(frozen=True)
class Probe:
    """An answer of `/ready`: when it was asked and answered, seconds of the monotonic clock."""

    asked: float
    answered: float
    status: int
    text: str = ""


@dataclass(frozen=True)
class Unready:
    """How readiness failed after a signal, seconds.

    Attributes:
        client: until a probe was refused and none was accepted after it.
        server: until the server's handler of the signal ran, as it says itself; what is left of
            `client` is the time between two probes, and the probe's own.
        slowest_before: longest answer of a probe before the signal.
    """

    client: float
    server: float
    slowest_before: float


async def watch(
    client: httpx.AsyncClient, send_signal: Callable[[], None], limit: float
) -> Unready:
    """Ask `/ready` over new connections, send the signal, and ask until it is refused for good.

    Args:
        client: keeps no connection alive.
        limit: seconds within which readiness must fail at all.

    Raises:
        EngineError: it did not fail, or the server is gone before.
    """
    before, after = [], []
    began = time.monotonic()
    while time.monotonic() - began < BEFORE_SECONDS:
        before.append(await _ask(client))
        await asyncio.sleep(PAUSE_SECONDS)
    sent = time.monotonic()
    send_signal()
    refused: float | None = None
    while refused is None or time.monotonic() - refused < SETTLED_SECONDS:
        if time.monotonic() - sent > limit:
            raise EngineError(f"readiness did not fail within {limit:.0f} s")
        after.append(await _ask(client))
        if after[-1].status == 200:
            refused = None
        elif refused is None:
            refused = after[-1].answered
        await asyncio.sleep(PAUSE_SECONDS)
    return judge(before, sent, after)


def judge(before: Sequence[Probe], sent: float, after: Sequence[Probe]) -> Unready:
    """What probes before and after a signal tell; `sent` is the time of the signal.

    Raises:
        EngineError: no probe was refused after the last one that was accepted.
    """
    accepted = [place for place, probe in enumerate(after) if probe.status == 200]
    refused = after[accepted[-1] + 1 :] if accepted else after
    if not refused:
        raise EngineError("the server is ready after the signal")
    first = refused[0]
    ago = _AGO.search(first.text)
    if ago is None:
        raise EngineError(f"the server does not say since when it shuts down: {first.text}")
    return Unready(
        client=round(first.answered - sent, 3),
        server=round(max(0.0, first.answered - sent - float(ago[1])), 3),
        slowest_before=round(max(probe.answered - probe.asked for probe in before), 3),
    )


async def _ask(client: httpx.AsyncClient) -> Probe:
    asked = time.monotonic()
    answer = await client.get("/ready")
    return Probe(asked, time.monotonic(), answer.status_code, answer.text)
