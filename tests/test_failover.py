"""What `common.dynamo.failover` makes of each way in which a call can end.

The races among them are those that real processes lose too rarely to be tested with them.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

import pytest

from common.dynamo.failover import DEFAULT_LIMITS, MAX_BROKEN_CALLS, CallLimits, Chosen, FailoverClient
from common.dynamo.runtime import Client, Context
from common.errors import Aborted, BadUpstream, Busy, InvalidRequest, Unavailable
from common.observability.metrics import Metrics
from common.wire import C, EngineChunk, ProcessorChunk
from tests.contexts import request_context

WAIT_S = 0.05
Item = dict[str, Any]


class AllOf:
    """A directory in which every instance is eligible."""

    ineligible_reason = ""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def eligible(self, request: dict[str, Any]) -> list[int]:
        return list(await self._client.instance_ids())


def failover_client(client: Any, kind: type[C], limits: CallLimits = DEFAULT_LIMITS) -> FailoverClient[C]:
    client.num_instances = lambda: 0
    return FailoverClient(cast("Client", client), AllOf(client), kind, Metrics("processor"), limits)


class DyingInstance:
    """Instance 1 has taken "slow", and its first word is on the way when a call of "quick" finds nobody there."""

    generation = 1

    def __init__(self) -> None:
        self.is_slow_taken, self.is_dead = asyncio.Event(), asyncio.Event()

    async def instance_ids(self) -> list[int]:
        return [1, 2] if self.is_dead.is_set() else [1]

    async def direct(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncIterator[Item]:
        if instance_id == 2:
            return self._whole()
        if request["ask"] == "quick":
            self.is_dead.set()
            raise ConnectionError("nobody there")
        return self._first_word(context)

    async def _first_word(self, context: Context) -> AsyncGenerator[Item, None]:
        self.is_slow_taken.set()
        while not context.is_stopped():
            await asyncio.sleep(0.01)
        yield {"content": "from 1"}

    async def _whole(self) -> AsyncGenerator[Item, None]:
        yield {"content": "from 2"}
        yield {"finish_reason": "stop"}


class GoneButListed:
    """An instance that etcd still lists, as it does while etcd itself is away, until another one comes."""

    generation = 1

    def __init__(self) -> None:
        self.num_calls = 0

    async def instance_ids(self) -> list[int]:
        return [1] if self.num_calls < MAX_BROKEN_CALLS + 2 else [2]

    async def direct(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncIterator[Item]:
        self.num_calls += 1
        if instance_id == 1:
            raise ConnectionError(self.words)
        return self._whole()

    words = "CannotConnect: NATS request to inference_engine.generate-1 failed"

    async def _whole(self) -> AsyncGenerator[Item, None]:
        yield {"finish_reason": "stop"}


class Breaking(GoneButListed):
    """One that takes requests, and breaks each time."""

    words = "Disconnected: Stream ended before generation completed"


class KilledMidway:
    """Instance 1 speaks for longer than a call waits for a first word, and then it is killed."""

    generation = 1

    def __init__(self, words: str) -> None:
        self._error = ValueError(words)

    async def instance_ids(self) -> list[int]:
        return [1, 2]

    async def direct(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncIterator[Item]:
        return self._broken() if instance_id == 2 else self._whole()

    async def _broken(self) -> AsyncGenerator[Item, None]:
        yield {"content": "from 2"}
        await asyncio.sleep(2 * WAIT_S)
        raise self._error

    async def _whole(self) -> AsyncGenerator[Item, None]:
        yield {"content": "from 1"}
        yield {"finish_reason": "stop"}


class Empty(GoneButListed):
    """One whose streams just end."""

    async def direct(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncIterator[Item]:
        return self._nothing()

    async def _nothing(self) -> AsyncGenerator[Item, None]:
        for chunk in ():
            yield chunk


@pytest.fixture
def short_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.dynamo.instances.QUARANTINE_S", 0.01)


def answer_of(client: GoneButListed) -> list[ProcessorChunk]:
    async def run() -> list[ProcessorChunk]:
        response_stream = await failover_client(client, ProcessorChunk).generate({}, context=request_context())
        return [chunk.data() async for chunk in response_stream]

    return asyncio.run(run())


def test_calls_that_nobody_took_do_not_use_up_the_attempts(short_rest: None) -> None:
    assert answer_of(GoneButListed()) == [ProcessorChunk(finish_reason="stop")]


@pytest.mark.parametrize("kind", [Breaking, Empty])
def test_a_request_that_breaks_every_instance_is_given_up(short_rest: None, kind: type[GoneButListed]) -> None:
    with pytest.raises(BadUpstream, match=r"8 calls of .* broke"):
        answer_of(kind())


@pytest.mark.parametrize(
    ("words", "is_known"),
    [
        ("Stream ended before generation completed", True),  # 0.5
        ("Disconnected: Stream ended before generation completed", True),  # 1.4
        ("Unavailable: Stream ended before generation completed", True),  # 1.6
        ("Unavailable: words that no rule knows of a broken stream", True),
        ("Severed: instance 77 said goodbye", False),
    ],
)
def test_an_answer_longer_than_the_wait_goes_on_elsewhere(
    words: str, is_known: bool, short_rest: None, caplog: pytest.LogCaptureFixture
) -> None:
    """What counts is that the call was delivered. Wording that is not known is logged, once, with its text."""

    async def run() -> str:
        client = failover_client(KilledMidway(words), ProcessorChunk, CallLimits(wait_s=WAIT_S))
        restarts: list[bool] = []
        stream = await client.generate({}, context=request_context(), on_restart=lambda: restarts.append(True))
        contents = [chunk.data().content async for chunk in stream]
        assert restarts == [True]
        return "".join(content or "" for content in contents)

    assert [asyncio.run(run()) for _ in range(2)] == ["from 2from 1"] * 2
    assert caplog.text.count("is not known") == (not is_known)
    assert is_known or words.replace("77", "#") in caplog.text


def test_nothing_is_delivered_of_a_call_that_was_given_up() -> None:
    """Its stream ends after that word, and where a word was delivered nobody else can begin anew."""

    async def run() -> list[list[str]]:
        dying = DyingInstance()
        client = failover_client(dying, ProcessorChunk)

        async def ask(what: str) -> list[str]:
            response_stream = await client.generate({"ask": what}, context=request_context())
            return [chunk.data().content or "end" async for chunk in response_stream]

        slow = asyncio.create_task(ask("slow"))
        await dying.is_slow_taken.wait()
        return await asyncio.gather(slow, ask("quick"))

    assert asyncio.run(run()) == [["from 2", "end"]] * 2


class Answering:
    """Instances that answer each call with the next of their answers, and with the last one from then on.

    calls: who was called, in order.
    """

    generation = 1

    def __init__(self, answers: dict[int, list[list[dict[str, Any]]]]) -> None:
        self._answers = answers
        self.calls: list[int] = []

    def __str__(self) -> str:
        return "engines"

    async def instance_ids(self) -> list[int]:
        return list(self._answers)

    async def direct(self, request: dict[str, Any], instance_id: int, context: Context) -> AsyncIterator[Item]:
        self.calls.append(instance_id)
        answers = self._answers[instance_id]
        return self._stream(answers.pop(0) if len(answers) > 1 else answers[0])

    async def _stream(self, answer: list[dict[str, Any]]) -> AsyncGenerator[Item, None]:
        for data in answer:
            yield data


FIRST_TOKEN, ANSWER = [{"token_ids": [0]}], [{"token_ids": [1], "finish_reason": "stop"}]
BUSY, REFUSED, ABORTED = ([kind("Told so.").to_wire()] for kind in (Busy, InvalidRequest, Aborted))


def ask(engines: Answering, num_requests: int = 1) -> list[list[int]]:
    """The tokens of each answer, one request after the other."""

    async def run() -> list[list[int]]:
        client: FailoverClient[EngineChunk] = failover_client(engines, EngineChunk)
        answers = []
        for _ in range(num_requests):
            response_stream = await client.generate({"token_ids": [7]}, context=request_context())
            answers.append([token_id async for chunk in response_stream for token_id in chunk.data().token_ids])
        return answers

    return asyncio.run(run())


def chunks_of(answer: list[Item]) -> list[list[int]]:
    async def run() -> list[list[int]]:
        client: FailoverClient[EngineChunk] = failover_client(Answering({1: [answer]}), EngineChunk)
        context = request_context()
        context.record.is_streamed = True
        stream = await client.generate({"token_ids": [7]}, context=context)
        return [chunk.data().token_ids async for chunk in stream]

    return asyncio.run(run())


def test_lone_tokens_come_several_at_once_where_many_streams_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one comes at once, and what an engine sends in one chunk waits for nothing."""
    monkeypatch.setattr("common.dynamo.failover.MAX_GAP_S", 10.0)
    monkeypatch.setattr("common.dynamo.failover.CHUNKS_PER_SECOND", 0.1)
    lone = [{"token_ids": [number]} for number in range(4)]
    assert chunks_of([*lone, {"finish_reason": "stop"}]) == [[0], [1, 2, 3]]
    assert chunks_of([*lone, {"token_ids": [4, 5]}, *ANSWER]) == [[0], [1, 2, 3, 4, 5], [1]]


def test_a_lone_token_waits_no_longer_than_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.dynamo.failover.CHUNKS_PER_SECOND", 1)

    class Stalling(Answering):
        async def _stream(self, answer: list[Item]) -> AsyncGenerator[Item, None]:
            for data in FIRST_TOKEN * 3:
                yield data
            await asyncio.Event().wait()

    async def run() -> list[list[int]]:
        client: FailoverClient[EngineChunk] = failover_client(Stalling({1: [[]]}), EngineChunk)
        context = request_context()
        context.record.is_streamed = True
        async with aclosing(await client.generate({"token_ids": [7]}, context=context)) as stream:
            return [(await anext(stream)).data().token_ids for _ in range(2)]

    assert asyncio.run(asyncio.wait_for(run(), 20)) == [[0], [0, 0]]


def test_tokens_that_wait_are_not_lost_when_the_engine_breaks(
    short_rest: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.dynamo.failover.MAX_GAP_S", 10.0)
    monkeypatch.setattr("common.dynamo.failover.CHUNKS_PER_SECOND", 0.1)
    engines = Answering({1: [[{"token_ids": [number]} for number in range(4)], ANSWER]})
    assert ask(engines) == [[0, 1, 2, 3, 1]]


def test_no_instance_is_called_for_a_client_that_left_while_one_was_chosen() -> None:
    async def run(instances: GoneButListed) -> None:
        client, context = failover_client(instances, ProcessorChunk), request_context()

        @asynccontextmanager
        async def choose(*_: Any) -> AsyncIterator[Chosen]:
            context.raw.stop_generating()
            yield Chosen(1)

        client.choose = choose
        assert [chunk async for chunk in await client.generate({}, context=context)] == []

    instances = GoneButListed()
    asyncio.run(run(instances))
    assert instances.num_calls == 0


def test_a_request_that_an_engine_refuses_is_not_repeated() -> None:
    engines = Answering({1: [REFUSED], 2: [REFUSED]})
    with pytest.raises(InvalidRequest, match="Told so"):
        ask(engines)
    assert len(engines.calls) == 1


def test_a_busy_engine_is_passed_over_for_this_request_only() -> None:
    engines = Answering({1: [BUSY], 2: [ANSWER]})
    assert ask(engines, 4) == [[1]] * 4
    assert engines.calls.count(1) > 1
    assert engines.calls.count(2) == 4


def test_when_all_engines_are_busy_the_client_hears_so_at_once() -> None:
    engines = Answering({1: [BUSY], 2: [BUSY]})
    with pytest.raises(Unavailable, match="All instances of engines are busy") as caught:
        ask(engines)
    assert caught.value.retry_after_s
    assert sorted(engines.calls) == [1, 2]


def test_an_answer_that_has_begun_waits_for_a_busy_engine(short_rest: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.dynamo.failover._BUSY_PAUSE_S", 0.01)
    engines = Answering({1: [FIRST_TOKEN, BUSY, BUSY, ANSWER]})
    assert ask(engines) == [[0, 1]]
    assert engines.calls == [1] * 4


def test_an_engine_that_gives_a_request_up_rests_while_others_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.dynamo.instances.QUARANTINE_S", 1000)
    engines = Answering({1: [ABORTED], 2: [ANSWER]})
    assert ask(engines, 4) == [[1]] * 4
    assert engines.calls.count(1) == 1
