"""When new requests are prefilled, and that SGLang asks."""

from types import SimpleNamespace
from typing import Any

import pytest

from common.sglang import pacing
from common.sglang.pacing import INTERRUPTIONS_PER_STREAM, MAX_INTERRUPTIONS, MAX_WAIT_S, PrefillBatching
from tests.sglang_probe import probe


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def batch(num_streams: int, *, is_decode: bool = True) -> Any:
    mode = SimpleNamespace(is_decode=lambda: is_decode)
    return SimpleNamespace(forward_mode=mode, batch_size=lambda: num_streams)


def a_request() -> bool:
    return True


def no_request() -> bool:
    return False


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def batching(clock: Clock) -> PrefillBatching:
    return PrefillBatching(clock)


def interrupt(batching: PrefillBatching, clock: Clock, num_streams: int, seconds: float) -> None:
    """Prefill new requests beside that many streams, which then stand still for so long."""
    assert batching.is_due(batch(num_streams), a_request)
    batching.taken()
    clock.now_s += seconds
    assert not batching.is_due(batch(num_streams), no_request)


def waited_s(batching: PrefillBatching, clock: Clock, num_streams: int) -> float:
    """How long a request that comes now waits, to a tenth of a millisecond."""
    came_at = clock.now_s
    while not batching.is_due(batch(num_streams), a_request):
        clock.now_s += 0.0001
    return clock.now_s - came_at


def test_an_idle_engine_takes_every_request_at_once(batching: PrefillBatching) -> None:
    for _ in range(3):
        assert batching.is_due(None, no_request)
        batching.taken()


@pytest.mark.parametrize(
    ("num_streams", "interruption_s", "expected_s"),
    [
        (1, 0.016, 0.016 * INTERRUPTIONS_PER_STREAM),
        (16, 0.016, 0.016 * 16 * INTERRUPTIONS_PER_STREAM),
        (1000, 0.016, 0.016 * MAX_INTERRUPTIONS),
        (1000, 3.0, MAX_WAIT_S),
    ],
)
def test_new_requests_wait_the_longer_the_more_streams_they_would_interrupt(
    batching: PrefillBatching, clock: Clock, num_streams: int, interruption_s: float, expected_s: float
) -> None:
    interrupt(batching, clock, num_streams, interruption_s)
    clock.now_s += 10  # however long none came
    assert waited_s(batching, clock, num_streams) == pytest.approx(expected_s, abs=0.0002)


def test_the_wait_is_the_first_ones_and_later_ones_are_taken_with_it(batching: PrefillBatching, clock: Clock) -> None:
    interrupt(batching, clock, 64, 0.01)
    assert not batching.is_due(batch(64), a_request)
    clock.now_s += 0.019
    assert not batching.is_due(batch(64), a_request)
    clock.now_s += 0.002
    assert batching.is_due(batch(64), a_request)
    batching.taken()
    clock.now_s += 0.01
    assert not batching.is_due(batch(64), a_request)  # those after them wait anew


def test_a_prefill_in_between_does_not_hide_the_streams_that_it_stopped(
    batching: PrefillBatching, clock: Clock
) -> None:
    interrupt(batching, clock, 64, 0.01)
    assert not batching.is_due(batch(2, is_decode=False), a_request)


def test_when_the_last_stream_has_ended_no_request_waits(batching: PrefillBatching, clock: Clock) -> None:
    interrupt(batching, clock, 64, 0.01)
    assert not batching.is_due(batch(64), a_request)
    assert batching.is_due(None, a_request)


def test_the_time_that_an_engine_idled_is_no_interruption(batching: PrefillBatching, clock: Clock) -> None:
    assert batching.is_due(None, a_request)
    batching.taken()  # one that wanted one token, so that no decoding followed
    assert batching.is_due(None, no_request)
    clock.now_s += 100
    assert not batching.is_due(batch(64), no_request)
    assert waited_s(batching, clock, 64) == 0


class Socket:
    """Holds requests until they are pulled."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    def poll(self, timeout_ms: int) -> int:
        assert timeout_ms == 0
        return len(self.requests)


def receiver(rank: int = 0, *, num_streams: int = 100) -> Any:
    ranks = SimpleNamespace(pp_rank=0, attn_tp_rank=rank, attn_cp_rank=0)
    sockets = {"recv_from_tokenizer": Socket(), "recv_from_rpc": Socket()}
    return SimpleNamespace(ps=ranks, get_last_batch=lambda: batch(num_streams), **sockets)


def pull(from_: Any) -> list[str]:
    sockets = (from_.recv_from_tokenizer, from_.recv_from_rpc)
    pulled = [request for socket in sockets for request in socket.requests]
    for socket in sockets:
        socket.requests.clear()
    return pulled


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, batching: PrefillBatching) -> None:
    monkeypatch.setattr(pacing, "_batching", batching)


@pytest.mark.parametrize("name", ["recv_from_tokenizer", "recv_from_rpc"])
def test_nothing_stays_in_a_socket_for_good(clock: Clock, batching: PrefillBatching, name: str) -> None:
    interrupt(batching, clock, 100, 0.01)
    reading = receiver()
    getattr(reading, name).requests.append("a request")
    assert pacing.take_in_batches(pull, reading) == []
    clock.now_s += MAX_WAIT_S
    assert pacing.take_in_batches(pull, reading) == ["a request"]


def test_only_the_rank_that_reads_the_sockets_decides(clock: Clock, batching: PrefillBatching) -> None:
    interrupt(batching, clock, 100, 0.01)
    assert pacing.take_in_batches(lambda _: None, receiver(rank=1)) is None


def test_sglang_loads_it_and_still_has_what_it_stands_around() -> None:
    assert probe()["prefill_batching"] == {
        "hooked": True,
        "receiver_has": ["get_last_batch", "ps", "recv_from_rpc", "recv_from_tokenizer"],
        "ranks_have": ["attn_cp_rank", "attn_tp_rank", "pp_rank"],
        "batch_has": ["batch_size", "forward_mode"],
    }
