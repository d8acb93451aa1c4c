"""Whether there is a grammar for a JSON schema, asked before an engine is.

llguidance makes one, here as in an engine on a CPU. It needs no model for that, and holds to limits of its own.
"""

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec

from common.errors import InvalidRequest
from common.openai.json_schema import check_ends

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Of llguidance's defaults a tenth to a half: an engine with the same grammar then has room.
MAX_ITEMS, MAX_GRAMMAR_SIZE, LEXER_FUEL = 1500, 50_000, 200_000
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
    from llguidance import LLMatcher, LLParserLimits

    try:
        check_ends(msgspec.json.decode(schema_text))
    except ValueError as error:
        return str(error)
    limits = LLParserLimits(
        max_items_in_row=MAX_ITEMS, max_grammar_size=MAX_GRAMMAR_SIZE, initial_lexer_fuel=LEXER_FUEL,
        verbose_errors=False,
    )  # fmt: skip
    try:
        matcher = LLMatcher(_bytes(), LLMatcher.grammar_from_json_schema(schema_text), log_level=0, limits=limits)
    except ValueError as error:
        return one_line(str(error))
    if not matcher.is_error():
        matcher.compute_bitmask()  # what may come first
    return one_line(matcher.get_error()) if matcher.is_error() else None


@functools.cache
def _bytes() -> "LLTokenizer":
    """A tokenizer of single bytes."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def one_line(message: str) -> str:
    """Of an error of llguidance: the reason, without its state and the whole grammar."""
    return " ".join(message.partition("<state>")[0].split()).rstrip(".")
