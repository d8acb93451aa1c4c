"""The processor's command line."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from common.environment_help import ENVIRONMENT


@dataclass(frozen=True)
class ProcessorArgs:
    """model: a folder or a hub name. engine_wait_s: how long a request waits for an engine, in seconds."""

    model: str
    model_names: list[str]
    engine_wait_s: float


def parse_processor_args(argv: Sequence[str] | None = None) -> ProcessorArgs:
    parser = argparse.ArgumentParser(
        prog="processor.py",
        description="Serves inference/processor/process: tokenizes chats, calls an engine, detokenizes the answer.",
        epilog=ENVIRONMENT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="whose tokenizer and chat template to use: a folder or a Hugging Face name; the engine's model",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help='the names that clients may send as "model" (default: the value of --model)',
    )
    parser.add_argument(
        "--engine-wait",
        type=float,
        default=30.0,
        metavar="S",
        help="how long a request waits for an engine to appear before it is answered with 503 (default: 30)",
    )
    args = parser.parse_args(argv)
    return ProcessorArgs(args.model, args.served_model_name or [args.model], args.engine_wait)
