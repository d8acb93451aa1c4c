"""What the router knows and how it chooses, without processes: caches told block by block, loads booked, costs."""

import asyncio
import random
import runpy
import statistics
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

import router
from common.dynamo.runtime import Context
from common.errors import InvalidRequest
from common.routing import kv_blocks, workers
from common.routing.kv_blocks import CachedBlocks, block_hashes, packed
from common.routing.workers import Booking, WorkerLoad
from common.wire import KV_BLOCK_SIZE, WorkerFound, WorkerQuestion, to_wire
from router import POLICIES, Policy, RequestHandler, kv
from tests.contexts import request_context
from tests.processes import ROOT
from tests.routers import Told
from tests.test_docs import EXPERIMENTS, block


def store(cached: CachedBlocks, token_ids: list[int], page_size: int) -> None:
    parent = None
    for end in range(page_size, len(token_ids) + 1, page_size):
        page = hash(tuple(token_ids[:end]))
        cached.store(page, parent, token_ids[end - page_size : end])
        parent = page
    cached.publish()


def pages(token_ids: list[int], page_size: int) -> list[int]:
    return [hash(tuple(token_ids[:end])) for end in range(page_size, len(token_ids) + 1, page_size)]


async def first_messages(cached: CachedBlocks, num: int) -> list[dict[str, Any]]:
    async with aclosing(cached.events({}, Context())) as stream:
        return [await anext(stream) for _ in range(num)]


@pytest.mark.parametrize("page_size", [1, 4, 16, 24, 64])
def test_a_late_router_is_told_what_is_cached_whatever_the_size_of_a_page(page_size: int) -> None:
    cached, told = CachedBlocks(), Told()
    token_ids = list(range(1000, 1000 + 192))
    store(cached, token_ids, page_size)
    (snapshot,) = asyncio.run(first_messages(cached, 1))
    told.tell(7, snapshot)
    assert told.has(7, token_ids) == 192 // KV_BLOCK_SIZE
    assert told.has(7, [*token_ids[:100], 5, *token_ids[100:]]) == 100 // KV_BLOCK_SIZE


@pytest.mark.parametrize("page_size", [1, 24, 64])
def test_branches_of_a_conversation_share_their_beginning_until_both_are_gone(page_size: int) -> None:
    cached, told = CachedBlocks(), Told()
    common = list(range(40))  # ends within a block, and within a page
    one, other = [*common, *range(100, 252)], [*common, *range(300, 452)]

    async def listen() -> None:
        async with aclosing(cached.events({}, Context())) as stream:
            told.tell(7, await anext(stream))
            store(cached, one, page_size)
            told.tell(7, await anext(stream))
            store(cached, other, page_size)
            told.tell(7, await anext(stream))
            assert (told.has(7, one), told.has(7, other), told.has(7, [*common, 9, 9, 9])) == (12, 12, 2)
            cached.remove([page for page in pages(one, page_size)[::-1] if page not in pages(other, page_size)])
            cached.publish()
            told.tell(7, await anext(stream))
            assert (told.has(7, one), told.has(7, other)) == (2, 12)
            cached.clear()
            cached.publish()
            told.tell(7, await anext(stream))
            assert told.has(7, other) == 0

    asyncio.run(listen())
    (snapshot,) = asyncio.run(first_messages(cached, 1))
    assert snapshot == {"events": []}


def test_a_router_that_is_too_far_behind_hears_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_blocks, "MAX_BEHIND", 2)

    async def listen() -> list[int]:
        cached = CachedBlocks()
        async with aclosing(cached.events({}, Context())) as stream:
            assert await anext(stream) == {"events": []}
            for number in range(3):  # one who hears of each change at once is never behind
                store(cached, prompt(number, 1024), 16)
                assert len((await anext(stream))["events"]) == 1
            for number in range(3, 6):
                store(cached, prompt(number, 1024), 16)
            return [1 async for _ in stream]

    assert asyncio.run(asyncio.wait_for(listen(), 20)) == []


def test_an_index_that_was_built_anew_knows_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_REMOVED", 40)
    told = Told()
    tree = told.index._tree
    common, rests = prompt(1, 320), [prompt(number, 320) for number in range(2, 6)]

    async def listen(worker_id: int) -> None:
        cached = CachedBlocks()
        async with aclosing(cached.events({}, Context())) as stream:
            for rest in rests:
                store(cached, [*common, *rest], 16)
            told.tell(worker_id, await anext(stream))
            cached.remove([*pages([*common, *rests[0]], 16)[:19:-1], *pages([*common, *rests[1]], 16)[:19:-1]])
            cached.publish()
            told.tell(worker_id, await anext(stream))

    asyncio.run(listen(7))
    assert told.index._tree is tree
    asyncio.run(listen(8))
    assert told.index._tree is not tree
    assert [[told.has(each, [*common, *rest]) for rest in rests] for each in (7, 8)] == [[20, 20, 40, 40]] * 2


def test_changes_follow_what_was_cached_and_pages_that_go_take_their_blocks_along() -> None:
    cached, told = CachedBlocks(), Told()
    token_ids = list(range(64))
    store(cached, token_ids[:32], 1)

    async def listen() -> None:
        async with aclosing(cached.events({}, Context())) as stream:
            told.tell(7, await anext(stream))
            assert told.has(7, token_ids) == 2
            store(cached, token_ids, 1)
            told.tell(7, await anext(stream))
            assert told.has(7, token_ids) == 4
            cached.remove(pages(token_ids, 1)[:39:-1])  # the last ones first, as engines do, to within a block
            cached.publish()
            told.tell(7, await anext(stream))
            assert told.has(7, token_ids) == 2
            store(cached, token_ids, 1)
            told.tell(7, await anext(stream))
            assert told.has(7, token_ids) == 4
            cached.clear()
            cached.publish()
            told.tell(7, await anext(stream))
            assert told.has(7, token_ids) == 0

    asyncio.run(listen())


def test_an_empty_cache_is_told_too_and_a_stopped_router_ends_the_stream() -> None:
    async def listen() -> list[dict[str, Any]]:
        context = Context()
        messages = []
        async for message in CachedBlocks().events({}, context):
            messages.append(message)
            context.stop_generating()
        return messages

    assert asyncio.run(asyncio.wait_for(listen(), 20)) == [{"events": []}]


def test_a_booking_is_prefill_until_the_prompt_is_cached_and_then_decode_until_it_ends() -> None:
    load = WorkerLoad()
    with load.booked(Booking(10, 4, [98, 99])):
        assert (load.num_requests, load.num_prefill_blocks, load.num_decode_blocks) == (1, 4, 0)
        with load.booked(Booking(5, 5, [97])):
            load.has_cached([1, 99])
            assert (load.num_requests, load.num_prefill_blocks, load.num_decode_blocks) == (2, 5, 10)
    assert load == WorkerLoad()


def test_a_prompt_that_is_cached_already_is_never_prefill() -> None:
    load = WorkerLoad()
    with load.booked(Booking(10, 1)):
        assert (load.num_prefill_blocks, load.num_decode_blocks) == (0, 10)
    assert load == WorkerLoad()


class Chooser:
    """The router's handler, asked in process; what it books stays booked until `answer_all`."""

    def __init__(self, policy: Policy = kv, temperature: float = 0.0) -> None:
        self.told = Told()
        self.handler = RequestHandler(policy, temperature, self.told.index)
        self.open: list[AsyncGenerator[WorkerFound, None]] = []
        self.context = request_context("router")

    async def choose(self, token_ids: list[int], worker_ids: list[int]) -> WorkerFound:
        stream = self.handler.find_worker(WorkerQuestion(worker_ids, token_ids), self.context)
        self.open.append(stream)
        return await anext(stream)

    async def answer_all(self) -> None:
        for stream in self.open:
            await stream.aclose()


def prompt(number: int, num_tokens: int = 512) -> list[int]:
    return random.Random(number).choices(range(49152), k=num_tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cold_burst_is_spread_evenly_by_every_policy(policy: str) -> None:
    async def burst() -> Counter[int]:
        chooser = Chooser(POLICIES[policy])
        found = [await chooser.choose(prompt(number), [1, 2, 3, 4]) for number in range(256)]
        await chooser.answer_all()
        assert all(load.num_requests == load.num_prefill_blocks == load.num_decode_blocks == 0
                   for load in chooser.told.loads.values())  # fmt: skip
        return Counter(each.worker_id for each in found)

    assert all(0.20 * 256 <= num <= 0.30 * 256 for num in asyncio.run(burst()).values())


def test_kv_sends_a_prompt_where_it_is_cached_unless_too_much_waits_there() -> None:
    async def ask() -> None:
        chooser = Chooser()
        cached = CachedBlocks()
        store(cached, prompt(1), 16)
        chooser.told.tell(2, cached._snapshot()[0])
        found = await chooser.choose([*prompt(1), 7, 7, 7], [1, 2, 3, 4])
        assert (found.worker_id, found.num_cached_tokens) == (2, 512)
        with ExitStack() as bookings:
            bookings.enter_context(chooser.told.loads[2].booked(Booking(80, 80, [5])))
            assert (await chooser.choose([*prompt(1), 7, 7, 7], [1, 2, 3, 4])).worker_id != 2

    asyncio.run(ask())


def test_the_hashes_of_a_prompt_say_what_its_tokens_say() -> None:
    async def ask() -> None:
        chooser, cached, token_ids = Chooser(), CachedBlocks(), prompt(1, 500)
        store(cached, token_ids, 16)
        chooser.told.tell(2, cached._snapshot()[0])
        hashes = packed(block_hashes(token_ids))
        by_hashes = to_wire(WorkerQuestion([1, 2], num_tokens=500, tokens_hashes=hashes))
        for question in ({"token_ids": token_ids, "worker_ids": [1, 2]}, by_hashes):
            stream = chooser.handler.find_worker(WorkerQuestion.read(question), chooser.context)
            assert await anext(stream) == WorkerFound(2, 496, hashed_block_size=16)
            assert chooser.told.loads[2].num_decode_blocks == 32
            await stream.aclose()

    asyncio.run(ask())


@pytest.mark.parametrize(
    "wrong",
    [{}, {"token_ids": []}, {"num_tokens": 16}, {"num_tokens": 20, "tokens_hashes": "AAAA"}, {"tokens_hashes": "AAAA"}],
)
def test_a_question_without_a_whole_prompt_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        WorkerQuestion.read({"worker_ids": [1], **wrong})


def test_kv_sends_a_prompt_where_its_beginning_is_about_to_be_cached() -> None:
    async def ask() -> None:
        chooser = Chooser()
        for worker_id in (1, 2, 3, 4):
            chooser.told.tell(worker_id, {"events": []})
        first = await chooser.choose([*prompt(1), *prompt(2, 64)], [1, 2, 3, 4])
        second = await chooser.choose([*prompt(1), *prompt(3, 64)], [1, 2, 3, 4])
        assert (second.worker_id, second.num_cached_tokens) == (first.worker_id, 0)
        assert chooser.told.loads[first.worker_id].num_prefill_blocks == 32 + 4 + 4
        await chooser.answer_all()
        assert chooser.told.loads[first.worker_id] == WorkerLoad(last_chosen=2)
        again = {(await chooser.choose([*prompt(1), *prompt(each, 64)], [5, 6])).worker_id for each in range(20)}
        assert again == {5, 6}  # they tell nothing
        await chooser.answer_all()

    asyncio.run(ask())


def test_a_prompt_is_prefill_until_it_is_cached_itself_not_one_that_ends_alike() -> None:
    async def ask() -> None:
        chooser, cached = Chooser(), CachedBlocks()
        chooser.told.tell(2, {"events": []})
        one, other = [*prompt(1), *prompt(3, 16)], [*prompt(2), *prompt(3, 16)]
        await chooser.choose(one, [2])
        load = chooser.told.loads[2]
        for token_ids, num_prefill_blocks in ((other, 33), (one, 0)):
            store(cached, token_ids, 16)
            for message in cached._snapshot():
                chooser.told.tell(2, message)
            assert load.num_prefill_blocks == num_prefill_blocks
        await chooser.answer_all()
        assert load == WorkerLoad(last_chosen=1)

    asyncio.run(ask())


def test_an_engine_that_tells_nothing_is_never_seen_at_a_prefill() -> None:
    async def ask() -> None:
        chooser = Chooser()
        await chooser.choose(prompt(1), [2])
        load = chooser.told.loads[2]
        assert (load.num_prefill_blocks, load.num_decode_blocks) == (0, 32)
        await chooser.answer_all()
        assert load == WorkerLoad(last_chosen=1)

    asyncio.run(ask())


def test_idle_workers_that_nobody_names_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        chooser = Chooser()
        monkeypatch.setattr(router, "FORGET_AFTER", 10)
        metrics = chooser.context.record.metrics
        await chooser.choose(prompt(1), [1])
        await chooser.choose(prompt(1), [2])
        await chooser.open[1].aclose()
        for _ in range(20):
            await chooser.choose(prompt(1), [3])
        assert chooser.told.loads.keys() == {1, 3}  # one is not idle
        assert [f'worker="{each}"' in metrics.text() for each in (1, 2, 3)] == [True, False, True]
        await chooser.answer_all()
        for _ in range(20):
            await chooser.choose(prompt(1), [3])
        assert chooser.told.loads.keys() == {3}
        assert 'worker="1"' not in metrics.text()
        await chooser.answer_all()

    asyncio.run(ask())


def test_a_lost_engine_is_chosen_only_where_there_is_no_other() -> None:
    async def ask() -> None:
        chooser = Chooser()
        chooser.told.index.lost = {1}
        assert {(await chooser.choose(prompt(number), [1, 2])).worker_id for number in range(20)} == {2}
        assert (await chooser.choose(prompt(1), [1])).worker_id == 1

    asyncio.run(ask())


def test_a_temperature_lets_the_second_best_win_now_and_then() -> None:
    async def ask() -> Counter[int]:
        chooser = Chooser(temperature=1.0)
        cached = CachedBlocks()
        store(cached, prompt(1), 16)
        chooser.told.tell(2, cached._snapshot()[0])
        found = Counter[int]()
        for _ in range(300):
            found[(await chooser.choose(prompt(1), [1, 2])).worker_id] += 1
            await chooser.answer_all()
            chooser.open.clear()
        return found

    found = asyncio.run(ask())
    assert found[2] > found[1] > 20


def test_a_decision_costs_less_than_four_looks_into_the_index() -> None:
    """With 4,096 tokens and 8 workers that have it all: 0.3 ms of CPU time where hashing and looking take 0.08."""

    async def decide_and_look() -> tuple[float, float]:
        chooser = Chooser()
        cached, token_ids, worker_ids = CachedBlocks(), prompt(1, 4096), list(range(1, 9))
        store(cached, token_ids, 16)
        for worker_id in worker_ids:
            for message in cached._snapshot():
                chooser.told.tell(worker_id, message)
        question, context = WorkerQuestion(worker_ids, token_ids), request_context("router")
        deciding_s, looking_s = [], []
        for _ in range(200):
            started_s = time.process_time()
            stream = chooser.handler.find_worker(question, context)
            assert (await anext(stream)).num_cached_tokens == 4096
            await stream.aclose()
            decided_s = time.process_time()
            assert len(chooser.told.index.num_cached_blocks(kv_blocks.block_hashes(token_ids))) == 8
            deciding_s.append(decided_s - started_s)
            looking_s.append(time.process_time() - decided_s)
        return statistics.median(deciding_s), statistics.median(looking_s)

    deciding_s, looking_s = asyncio.run(decide_and_look())
    assert deciding_s < 4 * looking_s


def test_the_policy_of_the_experiments_page_sends_all_that_begin_alike_to_one(tmp_path: Path) -> None:
    code = block(EXPERIMENTS, "def longest_prefix", "python").text
    changed = tmp_path / "router.py"
    changed.write_text(
        (ROOT / "router.py").read_text().replace("class RequestHandler", f"{code}\n\n\nclass RequestHandler")
    )
    policies = runpy.run_path(str(changed))["POLICIES"]

    async def ask(policy: Policy) -> set[int]:
        chooser, cached = Chooser(policy), CachedBlocks()
        store(cached, prompt(1), 16)
        chooser.told.tell(2, cached._snapshot()[0])
        return {(await chooser.choose([*prompt(1), *prompt(each, 64)], [1, 2])).worker_id for each in range(100)}

    assert asyncio.run(ask(policies["longest-prefix"])) == {2}
    assert asyncio.run(ask(policies["kv"])) == {1, 2}
