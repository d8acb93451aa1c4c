"""When newcomers are taken in, and that SGLang asks."""

from types import SimpleNamespace
from typing import Any

import pytest

from common import gathered_prefills
from common.gathered_prefills import MAX_WAIT_S, WAIT_S_PER_STREAM, Gathering, take_when_gathered
from tests.sglang_probe import probe


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def batch(num_streams: int, *, is_decode: bool = True) -> Any:
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: is_decode), batch_size=lambda: num_streams
    )  # fmt: skip


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gathering(clock: Clock) -> Gathering:
    return Gathering(clock)


def test_an_idle_engine_takes_everybody_at_once(gathering: Gathering) -> None:
    for _ in range(3):
        assert gathering.is_time(None)
        gathering.taken()


def test_the_first_newcomer_after_a_quiet_time_does_not_wait(gathering: Gathering) -> None:
    assert gathering.is_time(batch(256))


@pytest.mark.parametrize(
    ("num_streams", "wait_s"), [(1, WAIT_S_PER_STREAM), (8, 8 * WAIT_S_PER_STREAM), (1000, MAX_WAIT_S)]
)
def test_the_next_ones_wait_the_longer_the_more_they_would_interrupt(
    gathering: Gathering, clock: Clock, num_streams: int, wait_s: float
) -> None:
    assert gathering.is_time(batch(num_streams))
    gathering.taken()
    clock.now_s += wait_s * 0.99
    assert not gathering.is_time(batch(num_streams))
    clock.now_s += wait_s * 0.02
    assert gathering.is_time(batch(num_streams))


def test_a_prefill_in_between_does_not_hide_the_streams_that_it_stopped(gathering: Gathering, clock: Clock) -> None:
    assert gathering.is_time(batch(50))
    gathering.taken()
    clock.now_s += 49 * WAIT_S_PER_STREAM
    assert not gathering.is_time(batch(2, is_decode=False))


def test_only_the_rank_that_reads_the_socket_decides(monkeypatch: pytest.MonkeyPatch, gathering: Gathering) -> None:
    monkeypatch.setattr(gathered_prefills, "_gathering", gathering)

    def receiver(rank: int) -> Any:
        return SimpleNamespace(
            ps=SimpleNamespace(pp_rank=0, attn_tp_rank=rank, attn_cp_rank=0), get_last_batch=lambda: batch(100)
        )

    assert take_when_gathered(lambda _: ["a request"], receiver(0)) == ["a request"]
    assert take_when_gathered(lambda _: ["another one"], receiver(0)) == []
    assert take_when_gathered(lambda _: None, receiver(1)) is None


def test_taking_nothing_makes_nobody_wait(monkeypatch: pytest.MonkeyPatch, gathering: Gathering) -> None:
    monkeypatch.setattr(gathered_prefills, "_gathering", gathering)
    receiver = SimpleNamespace(
        ps=SimpleNamespace(pp_rank=0, attn_tp_rank=0, attn_cp_rank=0), get_last_batch=lambda: batch(100)
    )
    assert take_when_gathered(lambda _: [], receiver) == []
    assert take_when_gathered(lambda _: ["a request"], receiver) == ["a request"]


def test_sglang_loads_it_and_still_has_what_it_stands_around() -> None:
    assert probe()["gathering"] == {
        "hooked": True,
        "receiver_has": ["get_last_batch", "ps"],
        "ranks_have": ["attn_cp_rank", "attn_tp_rank", "pp_rank"],
        "batch_has": ["batch_size", "forward_mode"],
    }
