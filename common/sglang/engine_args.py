"""engine.py's command line: SGLang's own, with the few settings that this pipeline needs.

Importing this module is cheap. SGLang, which takes ten seconds to import, is imported once
the model is known to exist.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from common.sglang.plugins import switch_on

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

PROG = "engine.py"
USAGE = f"{PROG} --model-path MODEL [any option of SGLang's server]"
HELP = """\
Serve a model with SGLang as the Dynamo endpoint inference.engine.generate: token ids in,
token ids out.

  --model-path MODEL  a folder, or a name on the Hugging Face hub
  --kv-events         tell routers what is cached, as the endpoint inference.engine.kv_events
  -h, --help          this text, then SGLang's own options (after about ten seconds)

Chosen here, whatever is given: --skip-tokenizer-init (the processor owns the tokenizer), and
no --incremental-streaming-output. Chosen unless given: --log-level warning. Without a GPU
also, unless given: --device cpu, --disable-overlap-schedule, --grammar-backend llguidance,
--sleep-on-idle, --max-total-tokens 32768, --mem-fraction-static 0.5, and OMP_NUM_THREADS at
half the cores. CUDA_VISIBLE_DEVICES="" hides the GPUs of a machine that has some.

The environment variables NATS_SERVER, ETCD_ENDPOINTS, DYN_LOG and DYN_SYSTEM_PORT (for /metrics)
mean what they mean everywhere in Dynamo.
"""

# The engine reads items that hold the whole answer so far, and sends on what is new in them.
REQUIRED_SETTINGS = {"skip_tokenizer_init": True, "incremental_streaming_output": False}
# Between the tokens of JSON one space at most: a small model can go on with white space until its tokens are used up.
# The first is xgrammar's setting, the second that of the others.
DEFAULTS = {
    "log_level": "warning",
    "constrained_json_disable_any_whitespace": True,
    "constrained_json_whitespace_pattern": " ?",
}
# 32768 tokens: four full contexts of 8192, 0.75 GB for SmolLM2-135M. Memory is touched as it is used.
CPU_DEFAULTS = {
    "device": "cpu",
    "disable_overlap_schedule": True,
    "grammar_backend": "llguidance",  # the usual xgrammar kills the scheduler on a CPU
    "sleep_on_idle": True,  # an idle scheduler burns a core otherwise
    "max_total_tokens": 32768,
    "mem_fraction_static": 0.5,
}
# SGLang follows a dead scheduler into death; first it would wait 5 s, requests and event loop with it.
ENVIRONMENT = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}
# OpenMP's threads wait for each other spinning: one that must share its core with another process slows
# all down (measured on 2 cores: from 22 to 2.5 tokens/s; with one thread less, from 16 to 15).
CPU_ENVIRONMENT = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}


def parse_engine_args(argv: Sequence[str]) -> "ServerArgs":
    """Turn a command line into SGLang's ServerArgs, and switch our plugins on for this process and those it spawns.

    Raises:
        SystemExit: after one clear line, where the arguments or the model are unusable.
    """
    _check_model(argv)
    switch_on()

    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.server_args_config_parser import ConfigArgumentMerger

    from common.sglang.cpu_platform import activate

    load_plugins()  # some may hook ServerArgs
    parser = argparse.ArgumentParser(prog=PROG, usage=USAGE)
    parser.add_argument("--kv-events", action="store_true", help="tell routers what is cached")
    ServerArgs.add_cli_args(parser)
    is_on_cpu = activate() is not None
    for name, value in (ENVIRONMENT | (CPU_ENVIRONMENT if is_on_cpu else {})).items():
        os.environ.setdefault(name, value)
    parser.set_defaults(**DEFAULTS, **(CPU_DEFAULTS if is_on_cpu else {}))
    arguments = parser.parse_args(ConfigArgumentMerger(parser).merge_config_with_args(list(argv)))
    if is_on_cpu and arguments.device != "cpu":
        _exit(f"--device {arguments.device}: PyTorch sees no such device here")
    vars(arguments).update(REQUIRED_SETTINGS)
    if arguments.kv_events:
        if arguments.kv_events_config:
            _exit("--kv-events and --kv-events-config: only one of them can be told what is cached")
        from common.sglang.cache_events import kv_events_config

        arguments.kv_events_config = kv_events_config()
    try:
        return ServerArgs.from_cli_args(arguments)
    except (ValueError, AssertionError, NotImplementedError, OSError) as error:
        _exit(str(error))


def keep_ports_local(server_args: "ServerArgs") -> None:
    """Have PyTorch's process groups listen on loopback, or not at all.

    Left alone, the rendezvous store listens on every interface, and Gloo on the interface
    that the host name resolves to. Call before the engine starts. Engines that span several
    nodes or replicas need real addresses and are left as they are.
    """
    if server_args.nnodes > 1 or server_args.dp_size > 1:
        return
    # A file in memory, which SGLang's processes open through this one and which ends with it: SIGKILL leaves no trace.
    store = os.memfd_create("rendezvous")
    os.environ.setdefault("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", f"file:///proc/{os.getpid()}/fd/{store}")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _check_model(argv: Sequence[str]) -> None:
    """Look for the model before SGLang is imported."""
    parser = argparse.ArgumentParser(prog=PROG, usage=USAGE, add_help=False)
    parser.add_argument("--model-path", "--model")
    parser.add_argument("--revision")
    parser.add_argument("--config")
    parser.add_argument("-h", "--help", action="store_true")
    arguments, _ = parser.parse_known_args(argv)
    if arguments.help:
        print(HELP, "\nSGLang's own options:\n", sep="", flush=True)
    elif arguments.model_path is not None:
        try:
            look_up_model(arguments.model_path, arguments.revision)
        except LookupError as error:
            _exit(f"--model-path {arguments.model_path}: {error.args[0]}")
    elif arguments.config is None:
        _exit("which model? Give --model-path a folder or a name on the Hugging Face hub")


def look_up_model(model: str, revision: str | None = None) -> None:
    """Make sure that `model` is a model's folder, a file of weights, or known to the Hugging Face hub.

    Raises:
        LookupError: it is none of them; the message says why, in one line.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "params.json").is_file():
            raise LookupError("the folder holds no model (no config.json)")
    elif path.is_file() or "://" in model or os.getenv("SGLANG_USE_MODELSCOPE"):
        pass  # SGLang's to judge: a GGUF file, an object store, another hub
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise LookupError("no such folder")
    else:
        _look_up_on_hub(model, revision)


def _look_up_on_hub(model: str, revision: str | None) -> None:
    import httpx
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
            HfApi().model_info(model, revision=revision, timeout=10)
    except (HFValidationError, RepositoryNotFoundError):
        raise LookupError("no such folder, and no such model on the Hugging Face hub") from None
    except RevisionNotFoundError:
        raise LookupError(f"the Hugging Face hub has no revision {revision} of it") from None
    except (httpx.HTTPError, OSError) as error:
        raise LookupError(f"no such folder, and the Hugging Face hub is out of reach ({error})") from error


def _exit(message: str) -> NoReturn:
    print(f"{PROG}: error: {message}", file=sys.stderr)
    raise SystemExit(2)
