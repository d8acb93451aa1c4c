"""The command lines of frontend.py, processor.py and router.py."""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

REASONING_PARSERS = ("auto", "none", "qwen3", "deepseek-r1")
OWN_TOOL_CALL_PARSERS = ("hermes", "qwen", "qwen25")  # one form under several names
ENVIRONMENT = """\
environment:
  NATS_SERVER        where NATS is (default nats://localhost:4222); NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD
  ETCD_ENDPOINTS     where etcd is (default http://localhost:2379); ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD,
                     ETCD_AUTH_CA, ETCD_AUTH_CLIENT_CERT, ETCD_AUTH_CLIENT_KEY
  DYN_LOG            what to log: error, warn, info, debug, trace, or a filter such as info,dynamo_runtime=debug
                     (DYN_LOG_LEVEL is read where DYN_LOG is not set); DYN_LOGGING_JSONL=1 for JSON lines
  DYN_SYSTEM_PORT    where to serve /metrics, up to 32767, on DYN_SYSTEM_HOST (default 127.0.0.1; no port by default)
  OTEL_EXPORT_ENABLED=1
                     to send spans by OTLP to OTEL_EXPORTER_OTLP_TRACES_ENDPOINT (default http://localhost:4317)
  DYN_TCP_RESPONSE_STREAM_HOST
                     the network interface on which answers come back to this process (default lo, this machine;
                     empty for that of the default route); DYN_TCP_RESPONSE_STREAM_PORT
  DYN_CHAT_CPUS      the CPUs for this process, such as 3 or 2-3 (default: any; SGLang's own processes are left alone)
"""


@dataclass(frozen=True)
class FrontendArgs:
    """Sizes in bytes, times in seconds. `api_keys`: empty means that nobody needs one."""

    host: str = "127.0.0.1"
    port: int = 8080
    is_port_shared: bool = False
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 900_000
    max_concurrency: int = 512
    request_timeout_s: float = 600.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    send_timeout_s: float = 30.0
    processor_wait_s: float = 30.0
    is_page_served: bool = True


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError("must be greater than 0")
        return value

    return parse


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError("must be a port, a number from 0 (any free one) to 65535")
    return int(text)


def _parser(script: str, description: str, more_environment: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=script,
        description=description,
        epilog=ENVIRONMENT + more_environment,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_frontend_args(argv: Sequence[str] | None = None) -> FrontendArgs:
    default = FrontendArgs()
    parser = _parser(
        "frontend.py",
        "OpenAI's chat completions over HTTP, answered by inference/processor/process.",
        "  DYN_CHAT_API_KEY   API keys, separated by commas, in addition to --api-key\n",
    )

    def number(field: str, text: str) -> None:
        flag, value = f"--{field.removesuffix('_s').replace('_', '-')}", getattr(default, field)
        parser.add_argument(
            flag, dest=field, type=_positive(type(value)), default=value, metavar="N", help=f"{text} (default: {value})"
        )

    parser.add_argument("--host", default=default.host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=default.port, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--share-port", dest="is_port_shared", action="store_true",
        help="let several frontends with this flag listen on one port; the kernel spreads the connections",
    )  # fmt: skip
    parser.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="require this key; may be repeated"
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="allow browsers on pages of this origin, such as https://example.com; may be repeated (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME",
        help="answer requests to these host names, and to those of loopback, only (default: any; on loopback: none)",
    )  # fmt: skip
    parser.add_argument(
        "--no-page", dest="is_page_served", action="store_false",
        help="serve no page at /, and ignore the header x-show-path",
    )  # fmt: skip
    number("max_body_bytes", "largest request body; NATS' max_payload is 1 MB by itself")
    number("max_concurrency", "requests in flight at once; more get 429")
    number("request_timeout_s", "seconds that one answer may take; then 504")
    number("header_timeout_s", "seconds that a client may take to send its headers")
    number("body_timeout_s", "seconds that a client may take to send its body")
    number("send_timeout_s", "seconds without reading until a client is dropped")
    number("processor_wait_s", "seconds to wait for a processor before 503")
    fields = vars(parser.parse_args(argv))
    keys = [*fields.pop("api_key"), *os.environ.get("DYN_CHAT_API_KEY", "").split(",")]
    return FrontendArgs(
        api_keys=tuple(key.strip() for key in keys if key.strip()),
        cors_origins=tuple(fields.pop("cors_origin")),
        allowed_hosts=tuple(fields.pop("allowed_hosts")),
        **fields,
    )


@dataclass(frozen=True)
class Parsing:
    """How texts are read. special_tokens: whether "<|im_end|>" in a message is that token, and not the text.

    reasoning: one of REASONING_PARSERS. tool_calls: a parser of SGLang's, or one of OWN_TOOL_CALL_PARSERS; None for
    what the chat template tells.
    """

    special_tokens: bool = False
    reasoning: str = "auto"
    tool_calls: str | None = None

    @property
    def has_foreign_calls(self) -> bool:
        """Whether a parser of SGLang's reads them."""
        return self.tool_calls is not None and self.tool_calls not in OWN_TOOL_CALL_PARSERS


@dataclass(frozen=True)
class ProcessorArgs:
    """model: a folder or a hub name. engine_wait_s: how long a request waits for an engine, in seconds."""

    model: str
    model_names: list[str]
    engine_wait_s: float
    parsing: Parsing


def parse_processor_args(argv: Sequence[str] | None = None) -> ProcessorArgs:
    parser = _parser(
        "processor.py", "Serves inference/processor/process: tokenizes chats, calls an engine, detokenizes the answer."
    )
    parser.add_argument(
        "--model", required=True, metavar="M",
        help="whose tokenizer and chat template to use: a folder or a Hugging Face name; the engine's model",
    )  # fmt: skip
    parser.add_argument(
        "--served-model-name", nargs="+", metavar="NAME",
        help='the names that clients may send as "model" (default: the value of --model)',
    )  # fmt: skip
    parser.add_argument(
        "--engine-wait", type=float, default=30.0, metavar="S",
        help="how long a request waits for an engine to appear before it is answered with 503 (default: 30)",
    )  # fmt: skip
    parser.add_argument(
        "--parse-special-tokens", action="store_true",
        help="read special tokens that clients write in messages, as other servers do; by default they are plain text",
    )  # fmt: skip
    parser.add_argument(
        "--reasoning-parser", choices=REASONING_PARSERS, default="auto",
        help='how the model marks what it thinks before it answers: qwen3 begins with "<think>", deepseek-r1 is within '
        "it from the start, none has no such marks; auto tells from the chat template (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--tool-call-parser", metavar="NAME",
        help="how the model writes calls of tools, by SGLang's name for it, such as llama3; for any but hermes "
        "SGLang is loaded, and PyTorch with it (default: hermes, where the chat template has that form)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    model_names = args.served_model_name or [args.model]
    parsing = Parsing(args.parse_special_tokens, args.reasoning_parser, args.tool_call_parser)
    return ProcessorArgs(args.model, model_names, args.engine_wait, parsing)


@dataclass(frozen=True)
class RouterArgs:
    """temperature: 0 for the worker with the lowest cost, always."""

    policy: str
    temperature: float


def parse_router_args(policies: Iterable[str], argv: Sequence[str] | None = None) -> RouterArgs:
    """policies: by their names, the default first."""
    names = list(policies)
    parser = _parser(
        "router.py", "Serves inference/router/find_worker: tells processors which engine shall answer a prompt."
    )
    parser.add_argument(
        "--policy", choices=names, default=names[0],
        help="kv: the engine with the least to compute, what it has cached left out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=_positive(float), default=0.0, metavar="T",
        help="choose at random, the more evenly the higher: at 1 the best engine is 2.7 times as likely as the worst "
        "(default: 0, always the best)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return RouterArgs(args.policy, args.temperature)
