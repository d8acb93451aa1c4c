"""Loads on peers, side by side: a table, a plot and a JSON file."""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil

from bench.client import Load
from bench.hops import measure_hops
from bench.peers import PEERS, Peer, Setting
from bench.processes import ROOT, frozen
from bench.report import Measures, measures, row, write_report
from bench.routing import POLICIES, ROUTED, Replicas, measure_routing
from bench.serving import BenchServing

MODEL = "models/SmolLM2-135M-Instruct"
LANES = (
    "cpu: the pipeline alone, on a fake engine; gpu: with SGLang; growth: cost against tokens, prompt, concurrency "
    "and number of requests; client: what a load client itself can do; hops: where the time to a first token goes "
    "(on a fake engine, or with --gpu on SGLang); routing: the router's policies (on fake engines, or on two SGLangs)"
)
PEERS_OF_LANE = {
    "cpu": ("mocker", "chapter", "ours"),
    "gpu": ("engine", "sglang", "dynamo", "chapter", "ours"),
    "growth": ("ours",),
    "client": ("instant",),
    "routing": ("ours",),
    "routing on GPUs": ("ours", "sglang", "dynamo"),
}
CONCURRENCY_OF_LANE = {"gpu": (256, 32, 1), "cpu": (256, 128, 64, 32, 8, 1), "client": (256, 64, 1)}
REQUESTS_PER_USER = {1: 12, 8: 8, 32: 6, 64: 6, 128: 5, 256: 3}
# Ten times the concurrency, the prompt, the answer; and 10,000 requests, for the memory.
GROWTH = ((12, 40, 128, 64), (120, 6, 128, 64), (12, 40, 128, 640), (12, 15, 1280, 64), (64, 157, 128, 64))
CPU_ENGINE_ARGS = ("--device", "cpu", "--disable-overlap-schedule", "--grammar-backend", "llguidance")
# The engine flags that a GPU lane needs to fit several SGLangs on one GPU, each with more cache than it can use.
_GPU_ENGINE_ARGS = (
    "--attention-backend triton --sampling-backend pytorch --mem-fraction-static 0.85 --max-total-tokens 131072 "
    "--cuda-graph-max-bs-decode 256 --watchdog-timeout 3600"
)
GPU_ENGINE_ARGS = _GPU_ENGINE_ARGS.split()
_PROMPTS_PER_LOAD = 1_000_000
_ENOUGH_CPUS = 12


def loads(args: argparse.Namespace) -> list[Load]:
    """The most loaded first: if time runs out, those are measured."""
    concurrency = args.concurrency or CONCURRENCY_OF_LANE.get(args.lane, ())
    sizes = [(users, REQUESTS_PER_USER.get(users, 4), args.max_tokens, 64) for users in concurrency]
    sizes = list(GROWTH) if args.lane == "growth" else sizes
    return [
        Load(users, times, is_stream, max_tokens, num_words)
        for users, times, max_tokens, num_words in sizes
        for is_stream in (False, True)
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("lane", choices=["cpu", "gpu", "growth", "client", "hops", "routing"], help=LANES)
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), help="default: all of the lane")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES, help="routing: which of ours")
    parser.add_argument("--concurrency", type=int, nargs="+", metavar="N", help="default: those of the lane")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--gpu", action="store_true", help="hops, routing: with SGLang on a GPU")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--engine-args", default=None, help="SGLang's flags, instead of the lane's own")
    parser.add_argument("--client", choices=["own", "bench_serving"], default="own", help="default: %(default)s")
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="S", help="for all peers together")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="S", help="start nothing new after S seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="where results and logs go")
    return parser.parse_args()


def start_all(peers: Sequence[Peer], timeout_s: float) -> list[Peer]:
    """Start all at once; those that are ready in time.

    Where there are CPUs enough, each peer's first SGLang scheduler gets the last of them, its second the one before:
    the peers take turns, and on rented machines one CPU may be a third faster than another, for as long as a run lasts.
    """
    began = time.monotonic()

    def is_up(peer: Peer) -> bool:
        try:
            peer.bring_up(timeout_s)
        except Exception as error:
            print(f"{peer.name}: left out: {error!s:.3000}", flush=True)
            return False
        print(f"{peer.name}: ready after {time.monotonic() - began:.0f} s", flush=True)
        return True

    with ThreadPoolExecutor(len(peers)) as threads:
        up = [peer for peer, is_ready in zip(peers, threads.map(is_up, peers), strict=True) if is_ready]
    if len(cpus := psutil.Process().cpu_affinity()) >= _ENOUGH_CPUS:
        for number, scheduler in (numbered for peer in up for numbered in enumerate(peer.schedulers(), 1)):
            scheduler.cpu_affinity([cpus[-number]])  # its main thread, which never sleeps
    return up


def measure_all(peers: Sequence[Peer], loads: Sequence[Load], num_rounds: int, until: float) -> Iterator[Measures]:
    """Peers in turn, so that each round sees all of them under the same conditions. Only one peer's SGLang runs at a
    time. until: a time of `time.monotonic` after which nothing new is started."""
    in_turn = [
        (load, peer)
        for _, load, peer in itertools.product(range(num_rounds), loads, peers)
        if load.num_users >= peer.least_concurrency
    ]
    for number, (load, peer) in enumerate(in_turn, 1):
        if time.monotonic() < until:
            with frozen([process for other in peers if other is not peer for process in other.schedulers()]):
                yield measure(peer, replace(load, first_prompt=2 * number * _PROMPTS_PER_LOAD))


def measure(peer: Peer, load: Load) -> Measures:
    peer.take(replace(load, requests_per_user=1, first_prompt=load.first_prompt + _PROMPTS_PER_LOAD))  # warms it up
    before = [child.usage() for child in peer.children]
    measured = measures(peer.name, load, peer.take(load))
    for child, (cpu_s_before, _) in zip(peer.children, before, strict=True):
        cpu_s, measured.rss_mib[child.name] = child.usage()
        measured.cpu_ms_per_request[child.name] = (cpu_s - cpu_s_before) * 1000 / load.num_requests
    return measured


def write_table(args: argparse.Namespace, table: str) -> None:
    (args.out / f"{args.lane}.md").write_text(table)
    print(table)


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.budget
    is_gpu = args.lane == "gpu" or args.gpu
    engine_args = GPU_ENGINE_ARGS if is_gpu else CPU_ENGINE_ARGS
    folder = Path(tempfile.mkdtemp(prefix="logs-", dir=args.out))
    is_serving = args.client == "bench_serving"
    setting = Setting(
        model=args.model,
        folder=folder,
        engine_args=engine_args if args.engine_args is None else args.engine_args.split(),
        is_engine_fake=not is_gpu,
        bench_serving=BenchServing(folder) if is_serving else None,
    )
    if args.lane == "hops":
        write_table(args, measure_hops(setting, num_requests=100, timeout_s=args.start_timeout))
        return
    is_routing = args.lane == "routing"
    kinds: Mapping[str, type[Peer]] = ROUTED if is_routing else PEERS
    names = args.peers or PEERS_OF_LANE["routing on GPUs" if is_routing and is_gpu else args.lane]
    done: list[Measures] = []
    peers: list[Peer] = []
    try:
        peers = start_all([kinds[name](setting) for name in names], args.start_timeout)
        if is_routing:
            routed = [peer for peer in peers if isinstance(peer, Replicas)]
            write_table(args, measure_routing(setting, routed, args.policies, num_rounds=args.rounds, until=until))
            return
        for measured in measure_all(peers, loads(args), args.rounds, until):
            done.append(measured)
            print(" | ".join(filter(None, row(measured))), flush=True)
            (args.out / f"{args.lane}.json").write_text(json.dumps([asdict(each) for each in done], indent=1))
    finally:
        for peer in peers:
            with suppress(Exception):
                peer.stop()
        if setting.bench_serving is not None:
            setting.bench_serving.close()
    write_report(done, args.out, args.lane)


if __name__ == "__main__":
    main()
