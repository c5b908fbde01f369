# SPDX-License-Identifier: Apache-2.0
"""The requests of the soak test: short, long, shared prefixes, cancelled, malformed, and probes.

Each kind sends one request and says what was wrong with the answer. Prompts are token ids, so that
lengths are exact, drawn from a seed. Probes are fixed greedy prompts whose answers are known from
an unloaded server.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

REQUEST_SECONDS = 120.0
PROBE_TOKENS = 48
CLEAR_LEAD = 1e-3
"""Least distance of the two likeliest tokens, in nats, for a probe's answer to be well defined."""
MALFORMED: tuple[tuple[str, bytes | dict[str, Any]], ...] = (
    ("no JSON", b'{"prompt": "a'),
    ("no object", b"[1, 2]"),
    ("negative max_tokens", {"prompt": "a", "max_tokens": -1}),
    ("max_tokens as text", {"prompt": "a", "max_tokens": "many"}),
    ("temperature as text", {"prompt": "a", "temperature": "warm"}),
    ("unknown model", {"prompt": "a", "model": "no-such-model"}),
    ("too long", {"prompt": [5] * 100_000}),
    ("token out of vocabulary", {"prompt": [2**31 - 1]}),
    ("n of zero", {"prompt": "a", "n": 0}),
)


@dataclass
class Tally:
    """Requests by kind, what went wrong, and what the probes answered."""

    sent: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    probes_checked: int = 0
    probes_different: int = 0

    def fail(self, kind: str, reason: str) -> None:
        """Count a failure; the first twenty are kept in words."""
        self.failed[kind] += 1
        if len(self.examples) < 20:
            self.examples.append(f"{kind}: {reason}")


@dataclass(frozen=True)
class Probe:
    """A greedy prompt and the tokens an unloaded server gives it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


class SoakLoad:
    """Sends requests to one server.

    Args:
        client: an HTTP client whose base URL is the server.
        model: the served name.
        vocabulary: prompts use token ids from 3 up to this, exclusive.
        max_model_len: tokens of the longest sequence served.
    """

    def __init__(
        self, client: httpx.AsyncClient, model: str, vocabulary: int, max_model_len: int, seed: int
    ) -> None:
        self.client, self.model = client, model
        self.vocabulary, self.max_model_len, self.seed = vocabulary, max_model_len, seed
        self.tally = Tally()
        self.probes: list[Probe] = []
        draw = random.Random(seed)
        self._prefixes = [self._tokens(draw, max_model_len // 3) for _ in range(3)]
        self._kinds: Mapping[str, Callable[[random.Random], Awaitable[str | None]]] = {
            "short": self._short,
            "long": self._long,
            "shared prefix": self._shared,
            "cancelled": self._cancelled,
            "malformed": self._malformed,
            "probe": self._probe,
        }

    async def find_probes(self, count: int) -> None:
        """Ask the unloaded server, one prompt after the other, until `count` answers are clear.

        Near ties are left out: there even float32 sums in another order pick another token.
        """
        draw = random.Random(f"probes {self.seed}")
        for _ in range(20 * count):
            if len(self.probes) == count:
                return
            prompt = self._tokens(draw, draw.randrange(8, self.max_model_len // 4))
            body = self._body(prompt, PROBE_TOKENS) | {"logprobs": 2, "return_token_ids": True}
            answer = await self.client.post("/v1/completions", json=body)
            answer.raise_for_status()
            choice = answer.json()["choices"][0]
            leads = [_lead(top) for top in choice["logprobs"]["top_logprobs"]]
            if len(leads) == PROBE_TOKENS and min(leads) > CLEAR_LEAD:
                self.probes.append(Probe(tuple(prompt), tuple(choice["token_ids"])))

    async def run(
        self, requests: int, seconds: float, users: int, tick: Callable[[], None]
    ) -> None:
        """Send `requests` requests with `users` open at once, or stop after `seconds`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        numbers = iter(range(requests))
        kinds = list(self._kinds)

        async def user() -> None:
            for number in numbers:
                if loop.time() > deadline:
                    return
                draw = random.Random(f"{self.seed} {number}")
                kind = draw.choices(kinds, (4, 2, 3, 2, 1, 2))[0]
                await self.send(kind, draw)
                tick()

        await asyncio.gather(*(user() for _ in range(users)))

    async def send(self, kind: str, draw: random.Random) -> None:
        """Send one request of a kind and count how it went."""
        self.tally.sent[kind] += 1
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                wrong = await self._kinds[kind](draw)
        except TimeoutError:
            wrong = f"no answer within {REQUEST_SECONDS:.0f} s"
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            self.tally.fail(kind, wrong)

    async def _short(self, draw: random.Random) -> str | None:
        return await self._complete(
            self._tokens(draw, draw.randrange(4, 33)), draw.randrange(4, 33)
        )

    async def _long(self, draw: random.Random) -> str | None:
        prompt = self._tokens(
            draw, draw.randrange(self.max_model_len // 3, self.max_model_len // 2)
        )
        return await self._complete(prompt, draw.randrange(32, self.max_model_len // 4))

    async def _shared(self, draw: random.Random) -> str | None:
        prompt = draw.choice(self._prefixes) + self._tokens(draw, draw.randrange(1, 40))
        return await self._complete(prompt, draw.randrange(8, 65))

    async def _complete(self, prompt: Sequence[int], tokens: int) -> str | None:
        answer = await self.client.post("/v1/completions", json=self._body(prompt, tokens))
        if answer.status_code != 200:
            return f"status {answer.status_code}: {answer.text[:200]}"
        made = int(answer.json()["usage"]["completion_tokens"])
        return None if made == tokens else f"{made} tokens instead of {tokens}"

    async def _cancelled(self, draw: random.Random) -> str | None:
        """Read a few events of a stream, then hang up in the middle of it."""
        body = self._body(self._tokens(draw, draw.randrange(16, 129)), self.max_model_len // 2)
        wanted = draw.randrange(0, 12)
        async with self.client.stream(
            "POST", "/v1/completions", json=body | {"stream": True}
        ) as answer:
            if answer.status_code != 200:
                return f"status {answer.status_code}"
            seen = 0
            async for line in answer.aiter_lines():
                seen += line.startswith("data:")
                if seen > wanted:
                    return None
        return f"the stream ended after {seen} events"

    async def _malformed(self, draw: random.Random) -> str | None:
        name, body = draw.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps({"model": self.model} | body)
        headers = {"Content-Type": "application/json"}
        answer = await self.client.post("/v1/completions", content=content, headers=headers)
        if 400 <= answer.status_code < 500:
            return None
        return f"{name} was answered with status {answer.status_code}: {answer.text[:200]}"

    async def _probe(self, draw: random.Random) -> str | None:
        probe = draw.choice(self.probes)
        body = self._body(probe.prompt, PROBE_TOKENS) | {"return_token_ids": True}
        answer = await self.client.post("/v1/completions", json=body)
        if answer.status_code != 200:
            return f"status {answer.status_code}: {answer.text[:200]}"
        found = tuple(answer.json()["choices"][0]["token_ids"])
        self.tally.probes_checked += 1
        self.tally.probes_different += found != probe.answer
        return None

    def _body(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        return [draw.randrange(3, self.vocabulary) for _ in range(count)]


def _lead(top: Mapping[str, float]) -> float:
    """Log-probability of the likeliest token over the second; tokens of equal text count as 0."""
    values = sorted(top.values(), reverse=True)
    return values[0] - values[1] if len(values) > 1 else 0.0
