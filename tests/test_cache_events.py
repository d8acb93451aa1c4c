"""SGLang's own publisher of what is cached, without a model: its events reach a router as blocks of 16 tokens."""

from tests.sglang_probe import probe


def test_a_router_hears_what_sglang_stores_removes_and_clears() -> None:
    heard = probe()["cache_events"]
    assert (heard["stored"], heard["removed"], heard["cleared"]) == (6, 2, 0)


def test_the_socket_leaves_nothing_behind() -> None:
    assert probe()["cache_events"]["left_behind"] == []


def test_an_engine_that_tells_somebody_else_serves_nothing() -> None:
    assert probe()["cache_events"]["served_elsewhere"] is False


def test_kv_events_need_no_more_than_a_flag() -> None:
    assert probe()["arguments"]["kv_events"]["kv_events_config"].startswith('{"publisher": "zmq", "endpoint": "ipc://')


def test_only_one_can_be_told() -> None:
    refused = probe()["arguments"]["told_twice"]
    assert refused["exit_code"] == 2
    assert "only one of them can be told what is cached" in refused["stderr"]
