"""Whose token ids mean the same: by the tokenizers' files, in a folder or in the hub's cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.dynamo.directories import has_same_tokenizer
from common.text.vocabulary import tokenizer_sha256
from common.wire import EngineDescription
from tests.processes import ROOT

TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "added_tokens": [{"id": 3, "content": "<|end|>"}],
    "truncation": None,
}


def folder_of(path: Path, tokenizer: Any, **how: Any) -> str:
    path.mkdir(parents=True)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer, **how))
    return str(path)


def test_the_same_vocabulary_is_the_same_tokenizer_however_it_was_written(tmp_path: Path) -> None:
    first = tokenizer_sha256(folder_of(tmp_path / "first", TOKENIZER))
    older_merges = TOKENIZER | {"model": TOKENIZER["model"] | {"merges": ["a b"]}, "truncation": {"max_length": 5}}
    assert len(first) == 64
    assert tokenizer_sha256(folder_of(tmp_path / "again", older_merges, indent=2)) == first


@pytest.mark.parametrize(
    "other",
    [
        TOKENIZER | {"added_tokens": [{"id": 3, "content": "<|stop|>"}]},
        TOKENIZER | {"model": {"vocab": {"a": 1, "b": 0, "ab": 2}}},
        TOKENIZER | {"model": {"vocab": [["a", -1.0], ["c", -2.0]]}},
    ],
)
def test_another_token_behind_an_id_is_another_tokenizer(tmp_path: Path, other: dict[str, Any]) -> None:
    first = tokenizer_sha256(folder_of(tmp_path / "first", TOKENIZER))
    assert tokenizer_sha256(folder_of(tmp_path / "other", other)) not in ("", first)


def test_a_model_whose_tokenizer_cannot_be_read_has_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert tokenizer_sha256(str(tmp_path / "empty")) == ""
    assert tokenizer_sha256(folder_of(tmp_path / "list", [])) == ""
    assert tokenizer_sha256(str(tmp_path / "nowhere" / "at" / "all")) == ""
    assert tokenizer_sha256("nobody/has-this-model") == ""


def test_a_hub_name_is_looked_up_in_the_cache(tmp_path: Path, embedded_model: str) -> None:
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    shutil.copy(ROOT / embedded_model / "tokenizer.json", snapshot)
    ask = "from common.text.vocabulary import tokenizer_sha256; print(tokenizer_sha256('some/model'))"
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, env={**os.environ, "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == tokenizer_sha256(embedded_model) != ""


@pytest.mark.parametrize(
    ("engine", "is_same"),
    [
        (("b", 100), True),
        (("b", 101), True),  # some models pad their vocabulary
        (("c", 100), False),
        (("", 100), True),
        (("", 101), False),
    ],
)
def test_the_hash_decides_where_both_have_one_and_the_vocabulary_size_elsewhere(
    engine: tuple[str, int], is_same: bool
) -> None:
    sha256, vocab_size = engine
    ours = EngineDescription("ours", context_length=10, vocab_size=100, tokenizer_sha256="b")
    theirs = EngineDescription("theirs", context_length=10, vocab_size=vocab_size, tokenizer_sha256=sha256)
    assert has_same_tokenizer(theirs, ours) is is_same
    assert has_same_tokenizer(ours, theirs) is is_same
