"""The shape of what SGLang's engine yields."""

from typing import Any, TypedDict


class Output(TypedDict):
    """output_ids: all tokens of the answer so far, the newest last. meta_info: SGLang's own, see its docs."""

    output_ids: list[int]
    meta_info: dict[str, Any]
