# SPDX-License-Identifier: Apache-2.0
"""The `openai` client against the real server: everything vLLM offers still works."""

from __future__ import annotations

import asyncio
import json
import string
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.conftest import MAX_MODEL_LEN, NAME
from vllm_eigen.server.launch.process import ServerProcess

pytestmark = pytest.mark.anyio


MESSAGES = [{"role": "user", "content": "Say something."}]
LETTERS = [3 + sorted(map(chr, range(33, 127))).index(x) for x in string.ascii_lowercase]
"""Token ids of the letters, so that noise is readable text."""


@pytest.fixture
def client(plain: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", timeout=60, max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [NAME]


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=NAME, prompt="abc", max_tokens=8, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 8)
    assert answer.choices[0].finish_reason == "length"


def test_chat_and_seed(client: openai.OpenAI) -> None:
    texts = [
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=24, temperature=1.0, seed=seed
        )
        .choices[0]
        .message.content
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_streaming_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=16, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    events = list(stream)
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 16
    assert any(event.choices and event.choices[0].delta.content for event in events)


def test_n_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=5, n=2, temperature=1.0, logprobs=True,
        top_logprobs=3, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 5
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) >= 3


def test_stop(client: openai.OpenAI) -> None:
    options = {
        "model": NAME, "prompt": "abc", "max_tokens": 24, "temperature": 1.0, "seed": 5,
        "extra_body": {"allowed_token_ids": LETTERS},
    }  # fmt: skip
    whole = client.completions.create(**options).choices[0].text
    stop = whole[10:13]
    cut = client.completions.create(**options, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"enum": ["Oslo", "Rome"]},
            "degrees": {"type": "integer", "minimum": 0, "maximum": 40},
        },
        "required": ["city", "degrees"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "w", "schema": schema}},
    )  # fmt: skip
    found = json.loads(answer.choices[0].message.content or "")
    assert found["city"] in ("Oslo", "Rome")
    assert 0 <= found["degrees"] <= 40


def test_tool_call(client: openai.OpenAI, checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "weather", "strict": True, "parameters": parameters}
    # The grammar allows any blanks and any number of calls, and this model says nothing but noise.
    blanks = AutoTokenizer.from_pretrained(checkpoint)(" \n\t\r")["input_ids"]
    answer = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        max_tokens=128,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        logit_bias={**{str(token): -100 for token in blanks}, "1": 100},
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.name == "weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Oslo", "Rome")


async def test_async_and_cancelled_stream(plain: ServerProcess) -> None:
    client = openai.AsyncOpenAI(base_url=f"{plain.url}/v1", api_key="none", timeout=60)
    prompts = ("one", "two", "three")
    answers = await asyncio.gather(
        *(client.completions.create(model=NAME, prompt=x, max_tokens=4) for x in prompts)
    )
    assert len(answers) == len(prompts)
    stream = await client.completions.create(
        model=NAME, prompt="x", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    await client.close()
    end = time.monotonic() + 10
    while True:  # the engine lets go of the abandoned request
        cache = httpx.get(f"{plain.url}/v1/kv_cache").json()
        if cache["requests"]["running"] == 0 and cache["tokens"]["used"] == 0:
            break
        assert time.monotonic() < end, cache
        await asyncio.sleep(0.1)


def test_errors_are_those_of_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="unknown", prompt="x", max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=NAME, prompt="x" * (MAX_MODEL_LEN + 1), max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model=NAME, prompt="x", max_tokens=-1)
