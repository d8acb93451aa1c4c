"""Small real tokenizers of each kind, made here, and what the tests of generated text share.

SmolLM2's own tokenizer joins them where `make model` has put it into models/.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common.text.generated_text import GeneratedText
from common.text.vocabulary import Vocabulary

SMOLLM2 = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct" / "tokenizer.json"

MULTIBYTE_TEXTS = {
    "emoji": "ok 👍 and 🎉",
    "CJK": "你好、世界。日本語と한국어",
    "ZWJ family": "a 👩\u200d👩\u200d👧\u200d👦 family",
    "flags": "🇩🇪🇫🇷 flags",
    "combining marks": "e\u0301a\u0308n\u0303 Z\u0351\u036b\u0343",
    "a real U+FFFD": "kept \ufffd here",
    "spaces": "  two leading,  two  inside, one trailing ",
    "controls": "tab\tline\r\nnul\x00del\x7f",
}
LINES = ["The capital of France is Paris.", "the quick brown fox, hello world", *MULTIBYTE_TEXTS.values()]


def byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|im_start|>", "<|im_end|>", "<\uff5cend▁of▁text\uff5c>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("    ", normalized=False), AddedToken("<tool call>", normalized=False)])
    return tokenizer


def byte_fallback(*, decoder: decoders.Decoder, prepends_space: bool) -> Tokenizer:
    """SentencePiece-like BPE with a token for every byte, as Llama 2, Mistral and Gemma have it."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    merges = ["▁ ▁", "l l", "▁ w", "o r", "▁w or", "▁ t", "h e", "▁t he"]
    for piece in [*"▁Hhelowrdtapcifn,.👍中\ufffd", *(merge.replace(" ", "") for merge in merges)]:
        vocab[piece] = len(vocab)
    pairs = [tuple(merge.split()) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if prepends_space else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<tool call>", normalized=False)])
    return tokenizer


def llama() -> Tokenizer:
    """Byte fallback with Llama's decoder, which strips the space that its normalizer puts in front."""
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return byte_fallback(decoder=decoder, prepends_space=True)


def gemma() -> Tokenizer:
    """Byte fallback with Gemma's decoder, which strips nothing."""
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return byte_fallback(decoder=decoder, prepends_space=False)


def metaspace() -> Tokenizer:
    """Metaspace without byte fallback, as T5 has it: its own decoder strips the leading space."""
    pieces = [("<unk>", 0.0), *((piece, -2.0) for piece in "▁helo中👍.")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder that is neither: it puts the spaces between the tokens itself."""
    pieces = ["[UNK]", "hello", "world", "token", "##ize", "##r", "##s", ",", ".", "中", "👍", "é"]
    model = models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    return tokenizer


BYTE_LEVEL = {"byte-level": byte_level()}
if SMOLLM2.exists():
    BYTE_LEVEL["SmolLM2"] = Tokenizer.from_file(str(SMOLLM2))
BYTE_FALLBACK = {"llama": llama(), "gemma": gemma()}
BYTE_TOKENIZERS = BYTE_LEVEL | BYTE_FALLBACK
TOKENIZERS = BYTE_TOKENIZERS | {"metaspace": metaspace(), "word-piece": word_piece()}

few_examples = settings(max_examples=50, deadline=None)


def with_each(tokenizers: dict[str, Tokenizer]) -> pytest.MarkDecorator:
    """Runs a test once for each tokenizer, as its argument `tokenizer`."""
    return pytest.mark.parametrize("tokenizer", list(tokenizers.values()), ids=list(tokenizers))


def with_each_text() -> pytest.MarkDecorator:
    """Runs a test once for each multibyte text, as its argument `text`."""
    return pytest.mark.parametrize("text", list(MULTIBYTE_TEXTS.values()), ids=list(MULTIBYTE_TEXTS))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


# GPT-2's alphabet: a byte that prints is its own character, the others are shifted to 256 and up, in order.
SHIFTED_BYTES = [byte for byte in range(256) if not (33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174)]


def id_of_byte(tokenizer: Tokenizer, byte: int) -> int | None:
    """The token that is this one byte; SmolLM2 has none for 21 bytes that hardly occur, 0xFF among them."""
    character = chr(256 + SHIFTED_BYTES.index(byte)) if byte in SHIFTED_BYTES else chr(byte)
    is_byte_fallback = tokenizer in BYTE_FALLBACK.values()
    token_id: int | None = tokenizer.token_to_id(f"<0x{byte:02X}>" if is_byte_fallback else character)
    return token_id


def ids_of_bytes(tokenizer: Tokenizer, text_bytes: bytes) -> list[int]:
    """One token for each byte that has one."""
    ids = (id_of_byte(tokenizer, byte) for byte in text_bytes)
    return [token_id for token_id in ids if token_id is not None]


def ids_by_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """All of a byte-level tokenizer's ids: no two of them stand for the same bytes."""
    return {vocabulary_of(tokenizer).bytes_of(token_id): token_id for token_id in range(tokenizer.get_vocab_size())}


def special_ids(tokenizer: Tokenizer) -> list[int]:
    return [token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special]


def id_runs(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids as a model may send them: of a text, of any tokens, of lone bytes, special, or unknown."""
    vocab_size = tokenizer.get_vocab_size()
    any_ids = st.lists(st.integers(0, vocab_size + 20), max_size=4)
    rare_ids = [*tokenizer.get_added_tokens_decoder(), vocab_size, 2**32 - 1]
    text_ids = st.text(max_size=6).map(lambda text: encode(tokenizer, text))
    runs = [any_ids, st.lists(st.sampled_from(rare_ids), max_size=3), text_ids]
    if tokenizer in BYTE_TOKENIZERS.values():
        characters = [character.encode() for character in ["€", "👍", "é", "\u0301", "\ufffd"]]
        cut_off = [character[:end] for character in characters for end in range(1, len(character) + 1)]
        invalid = [b"\xff", b"\x80", b"\xf0\x80", b"\xed\xa0", b"\xed\xa0\x80", b"\xf4\x90", b"\xc0\x80"]
        byte_runs = st.sampled_from([*cut_off, *invalid, b" "]) | st.binary(max_size=3)
        runs.append(byte_runs.map(lambda text_bytes: ids_of_bytes(tokenizer, text_bytes)))
    return st.one_of(runs)


def id_chunks(tokenizer: Tokenizer) -> st.SearchStrategy[list[list[int]]]:
    """Any sequence of ids in any split: the chunks of one generation."""
    whole = st.lists(id_runs(tokenizer), max_size=10)
    return whole.flatmap(lambda runs: splits([token_id for run in runs for token_id in run]))


def splits(token_ids: list[int]) -> st.SearchStrategy[list[list[int]]]:
    """Every way to cut a sequence into chunks, empty ones included."""
    cuts = st.lists(st.integers(0, len(token_ids)), max_size=len(token_ids) + 2).map(sorted)
    return cuts.map(lambda cut: [token_ids[a:b] for a, b in pairwise([0, *cut, len(token_ids)])])


vocabulary_of = functools.cache(Vocabulary)


def generated_text(tokenizer: Tokenizer, *stop: str) -> GeneratedText:
    """Of a generation that has just begun, without its special tokens."""
    vocabulary = vocabulary_of(tokenizer)
    return GeneratedText(vocabulary, vocabulary.special_ids, stop)


def detokenize(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """The text of a whole generation; a character cut off at its end is dropped."""
    return generated_text(tokenizer).push(token_ids)
