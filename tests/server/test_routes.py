"""Every route through the official client, over a rank that says what it is told to."""

from __future__ import annotations

import base64
import http.client
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted import HIDDEN, TEXT, Script, Server, eventually, make_model, scripted_server, texts

from multitensor.engine import grammar
from multitensor.engine.request import CompletionOutput
from multitensor.server.routes_completions import _mean_logprob

MESSAGES: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def script() -> Script:
    return Script()


@pytest.fixture(scope="module")
def server(model: Path, script: Script) -> Iterator[Server]:
    with scripted_server(model, script, max_choices=8) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


# --- chat ---


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tide", messages=MESSAGES)
    assert answer.object == "chat.completion" and answer.model == "tide" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == TEXT
    assert choice.finish_reason == "stop" and choice.logprobs is None and choice.message.tool_calls is None
    assert answer.usage is not None and answer.usage.completion_tokens == 17
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 17
    assert answer.system_fingerprint and abs(answer.created - time.time()) < 60


def test_a_stream_says_the_same_in_pieces_and_ends_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tide", messages=MESSAGES)
    chunks = list(
        client.chat.completions.create(
            model="tide", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert texts(chunks) == TEXT
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert len(chunks) > 5, "it came in pieces"


def test_without_include_usage_no_chunk_has_usage(server: Server) -> None:
    body = {"messages": MESSAGES, "stream": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    assert "usage" not in answer.text


def test_several_choices_are_kept_apart(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tide", messages=MESSAGES, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {TEXT}
    chunks = list(client.chat.completions.create(model="tide", messages=MESSAGES, n=3, stream=True))
    for index in range(3):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in own) == TEXT
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="tide", messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=4, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert "".join(entry.token for entry in entries) == TEXT[:5]  # "T", "he", " ", "t"
    assert b"".join(bytes(entry.bytes) for entry in entries) == TEXT[:5].encode()
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)


def test_both_names_of_the_limit(client: openai.OpenAI) -> None:
    for limit in ({"max_tokens": 2}, {"max_completion_tokens": 2}, {"max_tokens": 2, "max_completion_tokens": 2}):
        answer = client.chat.completions.create(model="tide", messages=MESSAGES, **limit)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == "The" and answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="two names of one limit"):
        client.chat.completions.create(model="tide", messages=MESSAGES, max_tokens=2, max_completion_tokens=3)


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tide", messages=MESSAGES, stop=["zebra", " comes"])
    assert answer.choices[0].message.content == "The tide" and answer.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(model="tide", messages=MESSAGES, stop=" comes", stream=True))
    assert texts(chunks) == "The tide"


def test_every_setting_reaches_the_sampler(client: openai.OpenAI, script: Script) -> None:
    client.chat.completions.create(
        model="tide",
        messages=MESSAGES,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=7,
        logit_bias={"5": -100, "6": 1},
        extra_body={"top_k": 11, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 2, "some_field_of_others": 1},
    )
    setup = script.setups[-1]
    assert (setup.temperature, setup.top_p, setup.top_k, setup.min_p) == (0.7, 0.9, 11, 0.05)
    assert (setup.presence_penalty, setup.frequency_penalty, setup.repetition_penalty) == (0.5, -0.5, 1.1)
    assert setup.logit_bias == {5: -100.0, 6: 1.0} and setup.min_tokens == 2


def test_null_is_not_given(server: Server, script: Script) -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "max_tokens", "tools", "stream_options", "user")
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES, **dict.fromkeys(names)})
    assert answer.status_code == 200, answer.text
    assert (script.setups[-1].temperature, script.setups[-1].top_p) == (1.0, 1.0)


def test_content_as_parts_is_the_same_prompt(client: openai.OpenAI) -> None:
    one = client.chat.completions.create(model="tide", messages=[{"role": "user", "content": "ab\ncd"}])
    parts: Any = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    other = client.chat.completions.create(model="tide", messages=[{"role": "user", "content": parts}])
    assert one.usage == other.usage and one.usage is not None
    image: Any = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="reads text only"):
        client.chat.completions.create(model="tide", messages=[{"role": "user", "content": image}])


def test_the_developer_is_the_system(client: openai.OpenAI) -> None:
    counts = [
        client.chat.completions.create(
            model="tide",
            messages=[{"role": role, "content": "be brief"}, *MESSAGES],  # type: ignore[misc,list-item]
        ).usage
        for role in ("developer", "system")
    ]
    assert counts[0] is not None and counts[1] is not None and counts[0].prompt_tokens == counts[1].prompt_tokens


# --- completions ---


def test_completions_of_texts_and_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tide", prompt=["sea", "land"], n=2, max_tokens=30)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {TEXT}
    assert client.completions.create(model="tide", prompt=[1, 2, 3], max_tokens=2).usage.prompt_tokens == 3  # type: ignore[union-attr]
    several = client.completions.create(model="tide", prompt=[[1, 2], [3]], max_tokens=2)
    assert len(several.choices) == 2 and several.usage is not None and several.usage.prompt_tokens == 3


def test_completions_default_to_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tide", prompt="sea")
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_completions_streamed(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tide", prompt=["a", "b"], max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.text for choice in own) == TEXT and own[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 34


def test_echo_and_best_of(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tide", prompt="Now: ", echo=True, max_tokens=30).choices[0].text == (
        "Now: " + TEXT
    )
    streamed = client.completions.create(model="tide", prompt="Now: ", echo=True, max_tokens=30, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Now: " + TEXT
    best = client.completions.create(model="tide", prompt="sea", best_of=3, n=1, max_tokens=3)
    assert len(best.choices) == 1 and best.usage is not None and best.usage.completion_tokens == 9


def test_log_probabilities_of_a_completion(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tide", prompt="sea", logprobs=2, max_tokens=4).choices[0].logprobs
    assert found is not None and found.tokens == ["T", "he", " ", "t"]
    assert found.token_logprobs == [-0.5] * 4 and found.text_offset == [0, 1, 3, 4]
    assert found.top_logprobs is not None and all(len(best) == 2 for best in found.top_logprobs)


def test_offsets_are_those_of_the_text_streamed_or_not(client: openai.OpenAI, script: Script) -> None:
    """Also where a stop string holds text back, and where tokens are parts of a character."""
    script.text = "Sea \u6d77\U0001f30a com co come on."
    question: Any = {"model": "tide", "prompt": "a", "logprobs": 1, "max_tokens": 60, "stop": ["comet", "co-"]}
    try:
        whole = client.completions.create(**question).choices[0]
        chunks = [chunk.choices[0] for chunk in client.completions.create(**question, stream=True)]
    finally:
        script.text = TEXT
    assert whole.text == "Sea \u6d77\U0001f30a com co come on." and whole.logprobs is not None
    data, offsets = b"", []
    for token in whole.logprobs.tokens or ():
        offsets.append(len(data.decode(errors="ignore")))
        data += bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()
    assert any(token.startswith("bytes:") for token in whole.logprobs.tokens or ()), "characters were split"
    assert whole.logprobs.text_offset == offsets
    streamed = [offset for choice in chunks if choice.logprobs for offset in choice.logprobs.text_offset or ()]
    assert "".join(choice.text for choice in chunks) == whole.text and streamed == offsets


def test_the_best_answer_may_be_a_certain_one() -> None:
    certain, likely = (CompletionOutput(0, "", [1], cumulative_logprob=total) for total in (0.0, -0.1))
    assert max(likely, certain, key=_mean_logprob) is certain


# --- the rest ---


def test_embeddings(client: openai.OpenAI, server: Server) -> None:
    answer = client.embeddings.create(model="tide", input=["sea", "land"])
    assert [entry.index for entry in answer.data] == [0, 1]
    assert len(answer.data[0].embedding) == HIDDEN
    assert answer.data[0].embedding[:2] == pytest.approx([3 / 800**0.5, 4 / 800**0.5])  # 32 pairs (3, 4), length 1
    raw = httpx.post(f"{server.url}/v1/embeddings", json={"input": [1, 2], "encoding_format": "base64"}).json()
    data = struct.unpack(f"<{HIDDEN}f", base64.b64decode(raw["data"][0]["embedding"]))
    assert data == pytest.approx(answer.data[1].embedding, rel=1e-6)
    assert raw["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert len(client.embeddings.create(model="tide", input="sea", dimensions=HIDDEN).data) == 1
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tide", input="sea", dimensions=7)


def test_a_grammar_shapes_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tide", messages=MESSAGES, extra_body={"grammar": 'root ::= "The " ("sea" | "sky")'}
    )
    assert answer.choices[0].message.content in ("The sea", "The sky") and answer.choices[0].finish_reason == "stop"
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    found = client.chat.completions.create(model="tide", messages=MESSAGES, response_format=wanted, n=2)
    assert [json.loads(choice.message.content or "") for choice in found.choices] == [{"a": 1}] * 2


def test_a_grammar_that_becomes_too_costly_is_an_error(
    client: openai.OpenAI, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be followed at first, and no more after some words: half a text is no answer."""
    monkeypatch.setattr(grammar, "LEXER_STATES", 400)
    costly: Any = {"type": "regex", "value": r"hello (.*o.{60}|.*w.{61}|.*s.{62})*"}
    script.text = "hello world, so long as words go on, sow no worse woes than ours"
    try:
        asked = {"model": "tide", "max_tokens": 300, "extra_body": {"grammar": costly}}
        for create, question in (
            (client.chat.completions.create, {"messages": MESSAGES, **asked}),
            (client.completions.create, {"prompt": "sea", **asked}),
        ):
            with pytest.raises(openai.BadRequestError, match=r"cannot be followed further: [^<]+$"):
                create(**question)
            with pytest.raises(openai.APIError, match=r"cannot be followed further: [^<]+$") as raised:
                list(create(**question, stream=True))
            assert raised.value.type == "invalid_request_error"
    finally:
        script.text = TEXT


def test_models(client: openai.OpenAI) -> None:
    (found,) = client.models.list().data
    assert found.id == "tide" and client.models.retrieve("tide") == found
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("other/model")
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)


def test_tokenize_and_back(server: Server) -> None:
    answer = httpx.post(f"{server.url}/tokenize", json={"prompt": "the tide", "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 1024
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "the tide"}
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a", "messages": MESSAGES}).status_code == 400
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_state_routes(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/ready").status_code == 200
    plan = httpx.get(f"{server.url}/v1/plan").json()
    assert plan["tensors"] and plan["devices"][0]["name"] == "cpu:0" and plan["model"] == "tide"
    assert "tensors" not in httpx.get(f"{server.url}/v1/plan?tensors=false").json()
    (held,) = plan["memory"]
    ratio = round((1 << 20) / plan["devices"][0]["weights_bytes"], 4)
    assert ratio > 0 and held == {"weights_bytes": 1 << 20, "kv_bytes": 2, "weights_over_plan": ratio}
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'multitensor_http_requests_total{route="/health",status="200"}' in metrics
    assert httpx.get(f"{server.url}/v1/stats").json()["devices"][0]["share"] == 1.0


def test_documents_need_nothing_from_outside(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "temperature" in document["components"]["schemas"]["ChatRequest"]["properties"]
    references = [text for text in str(document).split("'") if text.startswith("#/components/schemas/")]
    assert references and all(name.rpartition("/")[2] in document["components"]["schemas"] for name in references)
    page = httpx.get(f"{server.url}/docs")
    assert "/v1/chat/completions" in page.text and "http" not in page.text.replace("HTTP", "")
    assert "default-src 'none'" in page.headers["content-security-policy"]


@pytest.mark.parametrize("key", ["EMPTY", "sk-of-another-service"])
def test_the_official_client_works_with_any_placeholder_for_a_key(server: Server, key: str) -> None:
    """An empty one, and blanks, it refuses to send itself."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=10) as client:
        assert client.chat.completions.create(model="tide", messages=MESSAGES).choices[0].message.content == TEXT


def test_an_empty_key_is_accepted_on_loopback(server: Server) -> None:
    """As other clients send it, and older official ones."""
    body = json.dumps({"messages": MESSAGES})
    for value in ("Bearer ", "Bearer", "Bearer any", ""):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        headers = {"Content-Type": "application/json", **({"Authorization": value} if value else {})}
        connection.request("POST", "/v1/chat/completions", body, headers)
        assert connection.getresponse().status == 200
        connection.close()


def test_who_hangs_up_is_cancelled(model: Path) -> None:
    script = Script(step_seconds=0.02)
    with scripted_server(model, script) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        body = {"messages": MESSAGES, "ignore_eos": True, "max_tokens": 900}
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()  # kept: dropping it closes the stream
            next(lines)
            assert eventually(lambda: server.engine.stats().running == 1)
        assert eventually(lambda: server.engine.stats().running == 0), "the stream's request went on"
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=body, timeout=0.5)
        assert eventually(lambda: server.engine.stats().running == 0), "the whole answer's request went on"


def test_a_ranks_death_is_told_and_the_next_request_answered(model: Path) -> None:
    script = Script(step_seconds=0.02)
    with scripted_server(model, script) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=10)
        stream = client.chat.completions.create(model="tide", messages=MESSAGES, stream=True)
        next(iter(stream))
        script.fail = True
        with pytest.raises(openai.APIError, match="rank 0 failed; all ranks are being started again") as raised:
            list(stream)
        assert "secret" not in str(raised.value)
        script.fail = False
        assert eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        script.fail = True
        with pytest.raises(openai.InternalServerError) as failed:
            client.chat.completions.create(model="tide", messages=MESSAGES)
        assert failed.value.status_code == 503 and "secret" not in str(failed.value)
        assert eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        assert client.chat.completions.create(model="tide", messages=MESSAGES).choices[0].message.content == TEXT
