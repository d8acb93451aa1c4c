"""Grammars in an engine that is otherwise free of text: answers that are the JSON which a schema describes.

With `--skip-tokenizer-init` SGLang's scheduler has no tokenizer, and so no grammars. Here it loads one for its grammar
backend alone. common/sglang/plugins.py calls `register` in the engine's processes.

What llguidance's grammars need beside that (SGLang 0.5.16): limits, since they work within the steps of the whole
batch; one that goes beyond them raises there, which ends the scheduler; its message is a page, with the client's
schema; the request ends without a reason; and each request compiles its schema once more.
"""

import copy
import logging
from collections import OrderedDict
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from common.openai.json_schema import GRAMMAR_FAILED, grammar_limits, one_line

logger = logging.getLogger(__name__)

MAX_CACHED_GRAMMARS = 256


def can_constrain(server_args: Any) -> bool:
    """Whether an engine with these arguments takes a schema. xgrammar kills SGLang's scheduler on a CPU."""
    backend = server_args.grammar_backend
    return backend not in (None, "none") and not (backend == "xgrammar" and server_args.device == "cpu")


def register() -> None:
    after, around, replace = HookType.AFTER, HookType.AROUND, HookType.REPLACE
    manager = "sglang.srt.constrained.grammar_manager.GrammarManager"
    HookRegistry.register(f"{manager}.__init__", give_a_backend, after)
    HookRegistry.register(f"{manager}.process_req_with_grammar", go_on_with_a_cached_grammar, after)
    HookRegistry.register(f"{manager}.get_ready_grammar_requests", go_on_with_compiled_grammars, after)
    grammar = "sglang.srt.constrained.llguidance_backend.GuidanceGrammar"
    HookRegistry.register(f"{grammar}.__init__", compile_within_limits, replace)
    HookRegistry.register(f"{grammar}.fill_vocab_mask", mask_or_end, around)
    results = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
    HookRegistry.register(f"{results}._apply_prefill_grammar", with_reason, around)
    HookRegistry.register(f"{results}._accept_grammar_tokens", with_reason, around)
    HookRegistry.register(f"{grammar}.copy", copy_compiled, replace)
    HookRegistry.register(f"{grammar}._check_err", check_error, replace)


class RecentGrammars(OrderedDict[Any, Any]):
    """SGLang's cache of compiled grammars, without those that were not asked for lately: clients make the keys."""

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self:
            self.move_to_end(key)
        return super().get(key, default)

    def __setitem__(self, key: Any, grammar: Any) -> None:
        super().__setitem__(key, grammar)
        while len(self) > MAX_CACHED_GRAMMARS:
            self.popitem(last=False)


def give_a_backend(_result: None, manager: Any, scheduler: Any) -> None:
    """Stands behind `GrammarManager.__init__`."""
    if manager.grammar_backend is None and can_constrain(scheduler.server_args):
        manager.grammar_backend = _backend(scheduler)
    if manager.grammar_backend is not None:
        manager.grammar_backend.cache = RecentGrammars()


def _backend(scheduler: Any) -> Any:
    from sglang.srt.constrained.base_grammar_backend import create_grammar_backend
    from sglang.srt.utils.hf_transformers_utils import get_tokenizer

    args, model = scheduler.server_args, scheduler.model_config
    try:
        tokenizer = get_tokenizer(
            args.tokenizer_path,
            tokenizer_mode=args.tokenizer_mode,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
            tokenizer_backend=args.tokenizer_backend,
        )
    except (OSError, ValueError) as error:
        logger.warning("no grammars, because there is no tokenizer: %s", error)
        return None
    return create_grammar_backend(
        args, tokenizer, model.vocab_size, model.hf_eos_token_id, think_end_id=model.think_end_id
    )


def go_on_with_a_cached_grammar(is_compiling: bool, _manager: Any, request: Any) -> None:
    """Stands behind `process_req_with_grammar`, which says whether the grammar is still to be compiled."""
    if not is_compiling:
        take_json_so_far(request)


def go_on_with_compiled_grammars(ready: list[Any], _manager: Any) -> None:
    """Stands behind `get_ready_grammar_requests`."""
    for request in ready:
        take_json_so_far(request)


def take_json_so_far(request: Any) -> None:
    """The grammar of an answer that another engine began goes on where that one broke."""
    num_tokens = (request.sampling_params.custom_params or {}).get("num_json_tokens", 0)
    if request.grammar is None or not num_tokens:
        return
    try:
        for token_id in request.origin_input_ids[-num_tokens:]:
            request.grammar.accept_token(token_id)
    except ValueError as error:
        request.set_finish_with_abort(f"The answer so far does not hold to its schema: {error}")


def compile_within_limits(grammar: Any, llguidance_tokenizer: Any, serialized_grammar: str) -> None:
    """Stands for `GuidanceGrammar.__init__`.

    Raises:
        ValueError: there is no such grammar.
    """
    from llguidance import LLMatcher
    from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject

    BaseGrammarObject.__init__(grammar)
    grammar.llguidance_tokenizer, grammar.serialized_grammar = llguidance_tokenizer, serialized_grammar
    grammar.eos_tokens = set(llguidance_tokenizer.eos_tokens)
    grammar.ll_matcher = LLMatcher(llguidance_tokenizer, serialized_grammar, log_level=0, limits=grammar_limits())
    check_error(grammar)


def mask_or_end(fill: Any, grammar: Any, vocab_mask: Any, index: int) -> None:
    """Stands around `fill_vocab_mask`. Where that fails, any token may come: SGLang ends the request with the next."""
    try:
        fill(grammar, vocab_mask, index)
    except ValueError as error:
        logger.warning("a grammar has failed: %s", error)
        vocab_mask[index] = -1


def with_reason(accept: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands around what ends a request whose grammar does not take its tokens, as if it had been aborted."""
    request = kwargs["req"] if "req" in kwargs else args[1]
    told_before = request.to_finish
    accepted = accept(*args, **kwargs)
    if request.to_finish is not told_before:
        request.to_finish.message = GRAMMAR_FAILED
    return accepted


def copy_compiled(grammar: Any) -> Any:
    """Stands for `copy`: a grammar at its beginning, with what was compiled."""
    copied = copy.copy(grammar)
    copied.ll_matcher = grammar.ll_matcher.deep_copy()
    copied.ll_matcher.reset()
    return copied


def check_error(grammar: Any) -> None:
    """Stands for `_check_err`."""
    if grammar.ll_matcher.is_error():
        raise ValueError(one_line(grammar.ll_matcher.get_error()))
