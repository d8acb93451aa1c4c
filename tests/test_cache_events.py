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


def test_thousands_of_pages_leave_others_their_turn_and_one_who_comes_meanwhile_hears_of_all() -> None:
    many = probe()["cache_events"]["many"]
    assert many["num_turns"] >= 8192 / 500
    assert 0 < many["began_with"] < many["num_heard"] == 512


def test_after_lost_events_only_what_came_since_is_known() -> None:
    heard = probe()["cache_events"]
    assert heard["whole"] == {"known": [6, 6], "is_over": False}
    assert heard["gap"] == {"known": [0, 6], "is_over": False}


def test_after_events_that_nobody_understands_only_the_next_ones_are_known() -> None:
    assert probe()["cache_events"]["garbage"] == {"known": [0, 6], "is_over": False}
