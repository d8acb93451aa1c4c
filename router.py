"""The router: which engine answers a prompt.

    processor --(NATS)--> router.find_worker        then the processor calls that engine itself
    engine.kv_events --(TCP)--> router              what each engine has cached

It serves `inference/router/find_worker`: token ids in, the id of a worker out. The stream of the answer stays open for
as long as that worker is at it, which is how the router knows what each has to do. No token passes through here.
"""

import math
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import uvloop

from common.arguments import RouterArgs, parse_router_args
from common.dynamo.runtime import DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.dynamo.service import RequestContext, service
from common.observability.metrics import Metrics
from common.routing.kv_blocks import block_hashes, chained_hashes, unpacked
from common.routing.workers import Booking, KvIndex, WorkerLoad
from common.wire import KV_BLOCK_SIZE, RouterDescription, WorkerFound, WorkerQuestion

# Costs beside that of a block which waits to be computed: of a block that this prompt adds (what is computed in vain is
# lost to all who wait, not to this prompt alone), of a request in flight (each new token takes a row of the batch), and
# of a block of its prompt in decoding (each new token reads it again).
NEW_BLOCK_WEIGHT, REQUEST_WEIGHT, DECODE_WEIGHT = 2.0, 1.0, 0.05
FORGET_AFTER = 10_000  # questions in a row that do not name a worker: it has left


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker, for one prompt. num_new_blocks: of the prompt, neither cached there nor about to be. load: what it has
    to do already.
    """

    num_new_blocks: int
    load: WorkerLoad


def round_robin(worker: Candidate) -> float:
    """The one that was chosen the longest ago."""
    return worker.load.last_chosen


def least_loaded(worker: Candidate) -> float:
    """The one with the fewest requests."""
    return worker.load.num_requests


def kv(worker: Candidate) -> float:
    """The one that has the least to compute, what it has been given already included."""
    prefill = NEW_BLOCK_WEIGHT * worker.num_new_blocks + worker.load.num_prefill_blocks
    decoding = REQUEST_WEIGHT * worker.load.num_requests + DECODE_WEIGHT * worker.load.num_decode_blocks
    return prefill + decoding


# A policy is the cost of a worker for a prompt: the lowest is chosen. Add yours here.
Policy = Callable[[Candidate], float]
POLICIES: dict[str, Policy] = {"kv": kv, "least-loaded": least_loaded, "round-robin": round_robin}


class RequestHandler:
    """Answers `find_worker` requests."""

    def __init__(self, policy: Policy, temperature: float, index: KvIndex) -> None:
        self.policy, self.temperature = policy, temperature
        self.index, self.loads = index, index.loads
        self.num_choices = 0
        self.named: set[int] = set()

    async def find_worker(self, request: WorkerQuestion, context: RequestContext) -> AsyncGenerator[WorkerFound, None]:
        """Yields the worker for a prompt, once; it is booked until the caller stops the stream, or is gone."""
        started_s = time.perf_counter()
        num_blocks = math.ceil(request.num_prompt_tokens / KV_BLOCK_SIZE)
        tokens_hashes = block_hashes(request.token_ids) if request.token_ids else unpacked(request.tokens_hashes)
        num_cached = self.index.num_cached_blocks(tokens_hashes)
        hashes = chained_hashes(tokens_hashes)
        worker_ids = [each for each in request.worker_ids if each not in self.index.lost] or request.worker_ids
        candidates = {}
        for each in worker_ids:
            num_soon = self.loads[each].num_blocks_soon(hashes, num_cached.get(each, 0))
            candidates[each] = Candidate(num_blocks - num_soon, self.loads[each])
        worker_id = self._choose(candidates)
        chosen, num_cached_blocks = candidates[worker_id], num_cached.get(worker_id, 0)
        is_prefill = worker_id in self.index.telling and num_cached_blocks < len(hashes)  # as far as anybody will tell
        booking = Booking(num_blocks, chosen.num_new_blocks, hashes[num_cached_blocks:] if is_prefill else [])
        self._forget_those_gone(request.worker_ids, context.record.metrics)
        context.record.metrics.decided(worker_id, num_cached_blocks * KV_BLOCK_SIZE, time.perf_counter() - started_s)
        with chosen.load.booked(booking):
            yield WorkerFound(worker_id, num_cached_blocks * KV_BLOCK_SIZE, hashed_block_size=KV_BLOCK_SIZE)
            await context.stopped()

    def _forget_those_gone(self, worker_ids: list[int], metrics: Metrics) -> None:
        self.named.update(worker_ids)
        if self.num_choices % FORGET_AFTER == 0:
            for worker_id in self.loads.keys() - self.named:
                if self.loads[worker_id].num_requests == 0:
                    del self.loads[worker_id]
                    metrics.forget_worker(worker_id)
            self.named.clear()

    def _choose(self, candidates: dict[int, Candidate]) -> int:
        """The lowest cost wins, by lot where several have it. At a higher temperature others win now and then, too."""
        costs = {worker_id: self.policy(candidate) for worker_id, candidate in candidates.items()}
        lowest, highest = min(costs.values()), max(costs.values())
        if self.temperature and highest > lowest:
            scale = self.temperature * (highest - lowest)
            weights = [math.exp((lowest - cost) / scale) for cost in costs.values()]
            worker_id = random.choices(list(costs), weights)[0]
        else:
            worker_id = random.choice([each for each, cost in costs.items() if cost == lowest])
        self.num_choices += 1
        candidates[worker_id].load.last_chosen = self.num_choices
        return worker_id


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, args: RouterArgs) -> None:
    namespace = runtime.namespace("inference")
    kv_events = await namespace.component("engine").endpoint("kv_events").client()
    index = KvIndex(kv_events)
    runtime.run_in_background(index.follow())

    component = namespace.component("router")
    await component.create_service()
    handler = RequestHandler(POLICIES[args.policy], args.temperature, index)
    find_worker = service(handler.find_worker, description=RouterDescription(args.policy))
    # Those who ask need no more than the answer: nobody waits for a stream's end.
    await component.endpoint("find_worker").serve_endpoint(find_worker, graceful_shutdown=False)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker(parse_router_args(POLICIES)))
