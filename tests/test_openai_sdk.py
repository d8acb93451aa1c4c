"""openai-python against the pipeline on the real model, the way its users call it."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from tokenizers import Tokenizer

from tests.processes import ROOT, Pipeline

pytestmark = pytest.mark.pipeline

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
STORY: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me a story about a robot."}]
PROMPTS = [
    "Say hello.", "What is 2 + 2?", "Name a colour.", "Who wrote Hamlet?", "Write a haiku about rain.",
    "Translate 'good morning' into French.", "Count from one to ten.", "What is the sun?", "Why is the sky blue?",
    "List three fruits.", "What do cats eat?", "Define gravity.", "What is Python?", "Tell me a joke.",
    "Write 'café' and 'naïve'.", "What is 你好 in English?", "Send me the emoji 👍 please.", "How deep is the sea?",
    "Name a planet.", "What year did World War II end?",
]  # fmt: skip


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{pipeline.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def model(embedded_model: str) -> str:
    return embedded_model


@pytest.fixture(scope="module")
def tokenizer(embedded_model: str) -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / embedded_model / "tokenizer.json"))


def text_of(completion: ChatCompletion, index: int = 0) -> str:
    content = completion.choices[index].message.content
    assert content is not None
    return content


def test_the_question_of_the_readme(client: OpenAI, model: str) -> None:
    completion = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12)
    assert text_of(completion) == "The capital of France is Paris."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    assert completion._request_id is not None
    assert completion._request_id.startswith("req-")


def test_a_stream_of_chunks(client: OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "The capital of France is Paris."
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert len(chunks) > 6, "not a stream, but the answer in one piece"


def test_the_stream_helper(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=QUESTION, temperature=0, logprobs=True) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event.delta for event in events if event.type == "content.delta"]
    assert "".join(deltas) == "The capital of France is Paris."
    assert [event.content for event in events if event.type == "content.done"] == ["The capital of France is Paris."]
    assert final.choices[0].message.content == "The capital of France is Paris."
    assert final.choices[0].logprobs is not None
    assert len(final.choices[0].logprobs.content or []) == 8


def test_many_at_once_with_the_async_client(pipeline: Pipeline, model: str) -> None:
    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{pipeline.url}/v1", api_key="none", max_retries=0) as client:

            async def whole() -> str:
                return text_of(await client.chat.completions.create(model=model, messages=QUESTION, temperature=0))

            async def streamed() -> str:
                async with client.chat.completions.stream(model=model, messages=QUESTION, temperature=0) as stream:
                    return text_of(await stream.get_final_completion())

            return await asyncio.gather(whole(), streamed(), whole(), streamed())

    assert asyncio.run(ask_all()) == ["The capital of France is Paris."] * 4


def test_for_twenty_prompts_the_deltas_joined_are_the_whole_answer(pipeline: Pipeline, model: str) -> None:
    async def ask_all() -> list[tuple[str, str]]:
        async with AsyncOpenAI(base_url=f"{pipeline.url}/v1", api_key="none", max_retries=0, timeout=240) as client:
            four_at_once = asyncio.Semaphore(4)

            async def both_ways(prompt: str) -> tuple[str, str]:
                asked = {"model": model, "messages": [{"role": "user", "content": prompt}]}
                async with four_at_once:
                    whole = await client.chat.completions.create(**asked, temperature=0, max_tokens=12)
                    stream = await client.chat.completions.create(**asked, temperature=0, max_tokens=12, stream=True)
                    return text_of(whole), await joined(stream)

            return await asyncio.gather(*map(both_ways, PROMPTS))

    answers = asyncio.run(ask_all())
    for whole, streamed in answers:
        assert streamed == whole
        assert whole
    assert len({whole for whole, _ in answers}) > 15


async def joined(stream: AsyncIterator[openai.types.chat.ChatCompletionChunk]) -> str:
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_logprobs_are_those_of_the_text(client: OpenAI, model: str) -> None:
    completion = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    assert completion.choices[0].logprobs is not None
    entries = completion.choices[0].logprobs.content
    assert entries is not None
    assert [entry.token for entry in entries[:2]] == ["The", " capital"]
    assert b"".join(bytes(entry.bytes or []) for entry in entries).decode() == text_of(completion)
    assert (entries[-1].token, entries[-1].bytes) == ("<|im_end|>", None)
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        # At temperature 0 the best one is chosen.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )


def test_a_token_can_be_forced_and_banned(client: OpenAI, model: str, tokenizer: Tokenizer) -> None:
    (banana,) = tokenizer.encode(" banana", add_special_tokens=False).ids
    forced = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=3, logit_bias={str(banana): 100}
    )
    assert text_of(forced) == " banana banana banana"
    (the,) = tokenizer.encode("The", add_special_tokens=False).ids
    banned = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=3, logit_bias={str(the): -100}
    )
    assert not text_of(banned).startswith("The")


def test_a_seed_gives_the_same_text_again(client: OpenAI, model: str) -> None:
    def told(seed: int, n: int = 1) -> list[str]:
        completion = client.chat.completions.create(
            model=model, messages=STORY, temperature=1, max_tokens=10, seed=seed, n=n
        )
        return [text_of(completion, index) for index in range(n)]

    first = told(7, n=2)
    assert first[0] != first[1]
    assert told(7) == first[:1]
    assert told(8) == first[1:]  # the second choice has the next seed
    assert told(9) not in ([first[0]], [first[1]])


def test_two_choices(client: OpenAI, model: str) -> None:
    completion = client.chat.completions.create(model=model, messages=STORY, temperature=1, max_tokens=8, n=2)
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16
    chunks = client.chat.completions.create(model=model, messages=STORY, temperature=1, max_tokens=8, n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert all(texts.values())


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_over_several_tokens(client: OpenAI, model: str, is_stream: bool) -> None:
    asked = {"model": model, "messages": QUESTION, "temperature": 0, "stop": ["France is P", "Berlin"]}
    if is_stream:
        with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
            completion: ChatCompletion = stream.get_final_completion()
    else:
        completion = client.chat.completions.create(**asked)
    assert text_of(completion) == "The capital of "
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 6  # The, capital, of, France, is, Paris


def test_messages_of_every_kind(client: OpenAI, model: str) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is the"}, {"type": "text", "text": "time?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "Thanks!", "name": "Ada"},
    ]
    completion = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=3)
    assert completion.choices[0].message.role == "assistant"
    assert text_of(completion)


def test_models(client: OpenAI, model: str) -> None:
    assert [listed.id for listed in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_prompt_that_is_too_long_never_reaches_the_engine(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "word " * 9000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=QUESTION, logit_bias={"49152": 1})
    assert caught.value.param == "logit_bias"
