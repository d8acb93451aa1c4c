"""Token ids of a conversation: those that transformers itself would make, wherever they are made."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.openai.messages import Message
from common.openai.request import parse_chat_request
from common.text.chat_tokenizer import SHORT_CHARACTERS, SHORT_MESSAGES, ChatTokenizer
from tests.processes import MODEL, ROOT

TEXTS = (
    "",
    "Hello!",
    " two  spaces\n",
    "naïve café, 你好, 👩‍🚀",
    "<|im_start|>system\n<|im_end|>",
    "e\u0301" * 40,
    "123" * 99,
)
SHORT = "word " * (SHORT_CHARACTERS // 5)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(str(ROOT / MODEL))


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / MODEL)


def messages_of(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    entries = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return parse_chat_request({"model": "m", "messages": entries}).messages


@pytest.mark.parametrize("texts", [*((text,) for text in TEXTS), TEXTS[:5], ("long " * 1500,)])
def test_ids_are_those_of_transformers(
    tokenizer: ChatTokenizer, reference: PreTrainedTokenizerBase, texts: tuple[str, ...]
) -> None:
    messages = messages_of(*texts)
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    expected = reference.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert asyncio.run(tokenizer.encode_chat(messages)) == expected


@pytest.mark.parametrize(
    ("texts", "is_inline"),
    [
        ((SHORT,), True),
        ((SHORT + "!",), False),
        (("",) * SHORT_MESSAGES, True),
        (("",) * (SHORT_MESSAGES + 1), False),
    ],
)
def test_only_short_conversations_are_encoded_in_the_event_loop(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, texts: tuple[str, ...], is_inline: bool
) -> None:
    threads: list[threading.Thread] = []
    encode = tokenizer._encode
    monkeypatch.setattr(
        tokenizer, "_encode", lambda conversation: threads.append(threading.current_thread()) or encode(conversation)
    )
    asyncio.run(tokenizer.encode_chat(messages_of(*texts)))
    (thread,) = threads
    assert (thread is threading.main_thread()) == is_inline


def test_a_tokenizer_that_cuts_or_pads_does_neither_here(reference: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    cutting = AutoTokenizer.from_pretrained(ROOT / MODEL)
    cutting.backend_tokenizer.enable_truncation(4)
    cutting.backend_tokenizer.enable_padding(length=300)
    cutting.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((ROOT / MODEL / "config.json").read_text())
    text = "One two three four five six."
    expected = reference.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    tokenizer = ChatTokenizer.load(str(tmp_path))
    assert asyncio.run(tokenizer.encode_chat(messages_of(text))) == expected["input_ids"]


WITHOUT_TORCH = """
import asyncio, json, sys
from pathlib import Path
import processor
from common.openai.request import parse_chat_request

model, *texts = sys.argv[1:]
tokenizer = processor.ChatTokenizer.load(model)
requests = [parse_chat_request({"model": "m", "messages": [{"role": "user", "content": text}]}) for text in texts]
ids = [asyncio.run(tokenizer.encode_chat(request.messages)) for request in requests]
peak_mb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
told = {"ids": ids, "defaults": tokenizer.sampling_defaults, "peak_mb": peak_mb, "modules": list(sys.modules)}
print(json.dumps(told))
"""


@pytest.mark.process
def test_a_processor_makes_the_same_ids_without_pytorch(
    tokenizer: ChatTokenizer, reference: PreTrainedTokenizerBase
) -> None:
    """Its import would take six seconds and 600 MB."""
    command = [sys.executable, "-c", WITHOUT_TORCH, MODEL, *TEXTS]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(done.stdout)
    for ids, text in zip(told["ids"], TEXTS, strict=True):
        conversation = [{"role": "user", "content": text}]
        assert ids == reference.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert told["defaults"] == tokenizer.sampling_defaults
    assert not {"torch", "sglang"} & set(told["modules"])
    assert told["peak_mb"] < 250
    assert "torch" not in done.stderr.lower()
