"""Loads on peers, side by side: a table, a plot and a JSON file."""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from bench.hops import measure_hops
from bench.measures import Measures
from bench.peers import PEERS, Peer, Setting, add_variant
from bench.plan import Case, Measuring
from bench.processes import ROOT
from bench.report import write_report
from bench.routing import measure_routing
from bench.scaling import measure_scaling

MODEL = "models/SmolLM2-135M-Instruct"
LANES = (
    "cpu: the pipeline alone, on a fake engine; gpu: with SGLang; growth: cost against tokens, prompt, concurrency "
    "and number of requests; client: what the load client itself can do; hops: where the time to a first token goes "
    "(on a fake engine, or with --gpu on SGLang); scaling: one, two and four engines, one and two processors; "
    "routing: the router's policies (on fake engines, or with --gpu on two SGLangs)"
)
PEERS_OF_LANE = {
    "cpu": ("mocker", "chapter", "ours"),
    "gpu": ("engine", "sglang", "dynamo", "chapter", "ours"),
    "growth": ("ours",),
    "client": ("instant",),
}
# Ten times the concurrency, the prompt, the answer; and 10,000 requests, for the memory.
GROWTH = [
    Case(concurrency, is_stream, requests_per_user, max_tokens, num_prompt_words)
    for is_stream in (False, True)
    for concurrency, requests_per_user, max_tokens, num_prompt_words in (
        (12, 40, 128, 64), (120, 6, 128, 64), (12, 40, 128, 640), (12, 15, 1280, 64), (64, 157, 128, 64),
    )
]  # fmt: skip
CPU_ENGINE_ARGS = ("--device", "cpu", "--disable-overlap-schedule", "--grammar-backend", "llguidance")
# The engine flags that a GPU lane needs to fit several SGLangs on one GPU, each with more cache than it can use.
_GPU_ENGINE_ARGS = (
    "--attention-backend triton --sampling-backend pytorch --mem-fraction-static 0.85 --max-total-tokens 131072 "
    "--cuda-graph-max-bs-decode 256 --watchdog-timeout 3600"
)
GPU_ENGINE_ARGS = _GPU_ENGINE_ARGS.split()


def cases(args: argparse.Namespace) -> list[Case]:
    """The most loaded first: if time runs out, those are measured."""
    if args.lane == "growth":
        return GROWTH
    default = {"gpu": (256, 32, 1), "cpu": (256, 128, 64, 32, 8, 1), "client": (256, 64, 1)}[args.lane]
    times = {1: 12, 8: 8, 32: 6, 64: 6, 128: 5, 256: 4}
    closed = [
        Case(concurrency, is_stream, times.get(concurrency, 4), args.max_tokens)
        for concurrency in args.concurrency or ((64,) if args.quick else default)
        for is_stream in (False, True)
    ]
    return closed + [
        Case(16, is_stream, 1, args.max_tokens, rate_per_s=rate)
        for rate in args.rate or ()
        for is_stream in (False, True)
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("lane", choices=["cpu", "gpu", "growth", "client", "hops", "scaling", "routing"], help=LANES)
    parser.add_argument("--peers", nargs="+", choices=sorted(PEERS), help="default: all of the lane")
    parser.add_argument("--concurrency", type=int, nargs="+", metavar="N", help="default: those of the lane")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--gpu", action="store_true", help="hops, routing: with SGLang on a GPU")
    parser.add_argument("--quick", action="store_true", help="concurrency 64 only, one round")
    parser.add_argument("--rate", type=float, nargs="+", metavar="R", help="open loop too, at R requests/s (Poisson)")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--engine-args", default=None, help="SGLang's flags, instead of the lane's own")
    parser.add_argument("--clients", type=int, default=None, metavar="N", help="processes of the load client")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="'NAME: VARIABLE=VALUE ... --engine-flag ...'",
        help="measure three processors and two frontends of ours with these, too; may be repeated",
    )  # fmt: skip
    parser.add_argument("--start-timeout", type=float, default=300.0, metavar="S", help="for all peers together")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="S", help="start nothing new after S seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="where results and logs go")
    return parser.parse_args()


def start_all(peers: Sequence[Peer], timeout_s: float) -> list[Peer]:
    """Start all at once; those that are ready in time."""
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
        return [peer for peer, up in zip(peers, threads.map(is_up, peers), strict=True) if up]


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.budget
    is_gpu = args.lane == "gpu" or args.gpu
    engine_args = (
        args.engine_args.split() if args.engine_args is not None else GPU_ENGINE_ARGS if is_gpu else CPU_ENGINE_ARGS
    )
    setting = Setting(
        model=args.model,
        folder=Path(tempfile.mkdtemp(prefix="logs-", dir=args.out)),
        engine_args=engine_args,
        is_engine_fake=not is_gpu,
        num_client_processes=args.clients or (4 if is_gpu else 1),
    )
    if args.lane == "hops":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            table = measure_hops(setting, executor, num_requests=100, timeout_s=args.start_timeout)
        (args.out / "hops.md").write_text(table)
        print(table)
        return
    if args.lane == "scaling":
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
            table = measure_scaling(setting, executor, num_rounds=args.rounds, timeout_s=args.start_timeout)
        (args.out / "scaling.md").write_text(table)
        print(table)
        return
    if args.lane == "routing":
        table = measure_routing(setting, num_rounds=args.rounds, timeout_s=args.start_timeout)
        (args.out / "routing.md").write_text(table)
        print(table)
        return
    names = [*(args.peers or PEERS_OF_LANE[args.lane]), *map(add_variant, args.variant)]
    done: list[Measures] = []

    def report(measured: Measures) -> None:
        done.append(measured)
        print(one_line(measured), flush=True)
        (args.out / f"{args.lane}.json").write_text(json.dumps([asdict(each) for each in done], indent=1))

    peers: list[Peer] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(setting.num_client_processes, mp_context=context) as executor:
        try:
            peers = start_all([PEERS[name](setting) for name in names], args.start_timeout)
            Measuring(peers, executor, report).run(
                cases(args), num_rounds=1 if args.quick else args.rounds, until=until
            )
        finally:
            for peer in peers:
                with suppress(Exception):
                    peer.stop()
    write_report(done, args.out, args.lane)


def one_line(measured: Measures) -> str:
    """For who is watching."""
    cpu = " ".join(f"{name}={spent:.2f}" for name, spent in measured.cpu_ms_per_request.items() if spent >= 0.005)
    load = f"{measured.rate_per_s:.0f}/s" if measured.rate_per_s else f"c={measured.concurrency}"
    stream = ""
    if measured.is_stream:
        stream = (
            f" ttft {measured.ttft_p50:.1f}/{measured.ttft_p99:.1f} gap {measured.gap_p50:.1f}/{measured.gap_p99:.1f} "
            f"longest {measured.longest_gap_p99:.1f}, {measured.tokens_per_event:.1f} tokens/event"
        )
    errors = f" {measured.num_errors} ERRORS: {measured.first_error}" if measured.num_errors else ""
    return (
        f"{measured.peer:8} {load} {'stream' if measured.is_stream else 'whole '} {measured.tokens_per_s:7.0f} tok/s "
        f"{measured.requests_per_s:6.1f} req/s latency {measured.latency_p50:.1f}/{measured.latency_p99:.1f} ms"
        f"{stream}; CPU ms/request: {cpu} client={measured.client_cpu_ms_per_request:.2f}{errors}"
    )


if __name__ == "__main__":
    main()
