"""openai-python against the pipeline on the real model, the way its users call it."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam, ChatCompletionTokenLogprob
from tokenizers import Tokenizer

from common.sglang.sampler import gumbel_noise
from tests.processes import Pipeline
from tests.tokenizers_for_tests import ids_by_bytes

pytestmark = pytest.mark.pipeline

QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name the capital of France."}]
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
    with OpenAI(base_url=f"{pipeline.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture
def model(embedded_model: str) -> str:
    return embedded_model


def logprobs_of(completion: ChatCompletion, index: int = 0) -> list[ChatCompletionTokenLogprob]:
    logprobs = completion.choices[index].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    return logprobs.content


def spelled(entries: list[ChatCompletionTokenLogprob]) -> str:
    """The text of some tokens, less a character that is cut off at the end."""
    return b"".join(bytes(entry.bytes or []) for entry in entries).decode(errors="ignore")


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
    assert len(logprobs_of(final)) == 8


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


def test_for_twenty_prompts_the_text_is_that_of_its_tokens_both_ways(pipeline: Pipeline, model: str) -> None:
    """Whether both ways take the same tokens is up to rounding, and that to who else is in the batch."""

    async def ask_all() -> list[list[tuple[str, str]]]:
        async with AsyncOpenAI(base_url=f"{pipeline.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            four_at_once = asyncio.Semaphore(4)

            async def both_ways(prompt: str) -> list[tuple[str, str]]:
                asked = {"model": model, "messages": [{"role": "user", "content": prompt}], "logprobs": True}
                async with four_at_once:
                    whole = await client.chat.completions.create(**asked, temperature=0, max_tokens=12)
                    stream = await client.chat.completions.create(**asked, temperature=0, max_tokens=12, stream=True)
                    choices = [chunk.choices[0] async for chunk in stream]
                text = "".join(choice.delta.content or "" for choice in choices)
                entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
                return [(text_of(whole), spelled(logprobs_of(whole))), (text, spelled(entries))]

            return await asyncio.gather(*map(both_ways, PROMPTS))

    answers = asyncio.run(ask_all())
    for text, of_tokens in chain.from_iterable(answers):
        assert text == of_tokens
    assert len({text for (text, _), _ in answers}) > 15


def test_logprobs_are_those_of_the_text(client: OpenAI, model: str) -> None:
    completion = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3
    )
    entries = logprobs_of(completion)
    assert [entry.token for entry in entries[:2]] == ["The", " capital"]
    assert spelled(entries) == text_of(completion)
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


def test_an_answer_goes_on_until_it_has_the_fewest_tokens_asked_for(client: OpenAI, model: str) -> None:
    """Where the model would have ended after 8, for two in one batch with one that may end then."""

    def num_tokens(**fields: object) -> int:
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=20, extra_body=fields
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(lambda min_tokens: num_tokens(min_tokens=min_tokens), (0, 12, 20)))
    assert counts[0] == 8
    assert 12 <= counts[1] <= 20
    assert counts[2] == 20


def test_a_stop_token_ends_the_text_before_it(client: OpenAI, model: str, tokenizer: Tokenizer) -> None:
    (paris,) = tokenizer.encode(" Paris", add_special_tokens=False).ids
    body = {"stop_token_ids": [paris]}
    completion = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, extra_body=body
    )
    assert (text_of(completion), completion.choices[0].finish_reason) == ("The capital of France is", "stop")
    assert (logprobs_of(completion)[-1].token, logprobs_of(completion)[-1].bytes) == (" Paris", None)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 6
    stream = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stream=True, stop="nowhere", extra_body=body
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text_of(completion)


def test_the_usage_tells_what_the_engine_had_cached(client: OpenAI, model: str) -> None:
    for _ in range(2):
        usage = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=1, n=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens is not None
    assert usage.prompt_tokens - 2 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens


def test_each_token_is_the_one_that_its_seed_draws(client: OpenAI, model: str, tokenizer: Tokenizer) -> None:
    """From the probabilities that the model gives this time: their last bits are rounding, and not up to the seed."""
    seed = 7
    completion = client.chat.completions.create(
        model=model, messages=STORY, temperature=1, top_p=1, max_tokens=10, seed=seed, n=2, logprobs=True,
        top_logprobs=20,
    )  # fmt: skip
    ids = ids_by_bytes(tokenizer)
    assert completion.usage is not None
    for index in range(2):  # the second choice has the next seed
        for number, entry in enumerate(logprobs_of(completion, index)):
            position = completion.usage.prompt_tokens - 1 + number
            noise = gumbel_noise(torch.tensor([seed + index]), torch.tensor([position]), len(ids))[0].tolist()
            drawn, *scores = (
                each.logprob + noise[ids[bytes(each.bytes or each.token.encode())]]
                for each in (entry, *entry.top_logprobs)
            )
            assert drawn == pytest.approx(max(drawn, *scores), abs=1e-3)


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
