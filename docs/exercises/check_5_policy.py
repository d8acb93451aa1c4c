"""Exercise 5: `cached-first`, a policy of the router."""

import pytest

from common.arguments import parse_router_args
from common.routing.workers import WorkerLoad
from router import POLICIES, Candidate


def choice(*workers: tuple[int, int]) -> int:
    """Which worker has the lowest cost. workers: the blocks that each would have to compute, and its requests."""
    assert "cached-first" in POLICIES, "POLICIES in router.py has no cached-first yet"
    policy = POLICIES["cached-first"]
    costs = [policy(Candidate(num_new_blocks, WorkerLoad(num_requests=num))) for num_new_blocks, num in workers]
    assert costs.count(min(costs)) == 1, f"for {workers} the costs are {costs}: who shall it be?"
    return costs.index(min(costs))


@pytest.mark.parametrize(
    ("workers", "chosen"),
    [
        ([(10, 0), (2, 0), (3, 0)], 1),
        ([(3, 0), (2, 7)], 1),  # one block less counts for more than seven requests
        ([(4000, 0), (3999, 7)], 1),
    ],
)
def test_who_has_the_least_to_compute_is_chosen(workers: list[tuple[int, int]], chosen: int) -> None:
    assert choice(*workers) == chosen


@pytest.mark.parametrize(("workers", "chosen"), [([(5, 3), (5, 1), (5, 2)], 1), ([(0, 7), (0, 6)], 1)])
def test_of_equals_the_one_with_fewer_requests(workers: list[tuple[int, int]], chosen: int) -> None:
    assert choice(*workers) == chosen


@pytest.mark.parametrize(("workers", "chosen"), [([(0, 8), (9000, 7)], 1), ([(0, 30), (0, 9000), (9000, 0)], 2)])
def test_who_has_eight_requests_comes_after_all_who_have_fewer(workers: list[tuple[int, int]], chosen: int) -> None:
    assert choice(*workers) == chosen


def test_where_all_have_eight_the_fewest_requests_count() -> None:
    assert choice((0, 20), (900, 9), (3, 12)) == 1


def test_the_command_line_knows_it() -> None:
    assert parse_router_args(POLICIES, ["--policy", "cached-first"]).policy == "cached-first"
