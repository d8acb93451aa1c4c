"""Whether there is a grammar for a JSON schema, asked before an engine is.

llguidance makes one, here as in an engine on a CPU, within the same limits. It needs no model for that.
"""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from common.errors import InvalidRequest
from common.openai.json_schema import check_ends, check_keywords

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

GRAMMAR_FAILED = (
    "the one that it made has failed, since it is too complex"  # how an engine's scheduler tells its engine
)

_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")


async def check_grammar(schema_text: str, param: str) -> None:
    """param: what asks for the grammar.

    Raises:
        InvalidRequest: llguidance has none for this schema.
    """
    if (reason := await asyncio.get_running_loop().run_in_executor(_thread, why_no_grammar, schema_text)) is not None:
        raise InvalidRequest(f"Invalid value for {param}: {reason}.", param=param)


@functools.lru_cache(maxsize=256)
def why_no_grammar(schema_text: str) -> str | None:
    """None where there is one."""
    from llguidance import LLMatcher

    schema = msgspec.json.decode(schema_text)
    try:
        check_keywords(schema)
        check_ends(schema)
    except ValueError as error:
        return str(error)
    try:
        matcher = LLMatcher(_bytes(), LLMatcher.grammar_from_json_schema(schema_text), log_level=0, limits=limits())
    except ValueError as error:
        return one_line(str(error))
    if not matcher.is_error():
        matcher.compute_bitmask()  # what may come first
    return one_line(matcher.get_error()) if matcher.is_error() else None


def limits() -> "LLParserLimits":
    """llguidance's own allow a pattern to take 40 ms of every token of the whole batch, and 500 MB.

    A token takes 2 ms at most (14,000 units of fuel a ms), a grammar 100 MB of states. Dates, addresses, lists of a
    thousand values need a tenth of that.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=200_000, step_lexer_fuel=30_000, max_lexer_states=50_000, max_grammar_size=50_000,
        verbose_errors=False,
    )  # fmt: skip


@functools.cache
def _bytes() -> "LLTokenizer":
    """A tokenizer of single bytes."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def one_line(message: str) -> str:
    """Of an error of llguidance: the reason, in one line."""
    return " ".join(message.partition("<non-verbose/>")[0].split()).rstrip(".")
