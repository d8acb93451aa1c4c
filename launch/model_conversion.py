"""From a GGUF file of SmolLM2 to what a hub would hold: bf16 safetensors, configs, tokenizer, chat template."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.command import LaunchError

CONTEXT_LENGTH = 8192
# The model card's. At OpenAI's temperature of 1, a model of 135 million parameters rambles.
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
QUESTION = "What is the capital of France?"
ANSWER = "Paris"

Progress = Callable[[str], None]


class ModelError(LaunchError):
    """The embedded model cannot be made."""


def convert(gguf: Path, target: Path, progress: Progress) -> None:
    """Write `target` as the hub has this model: safetensors, configs, tokenizer, chat template."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is on disk: a missing network must not matter
    os.environ["TQDM_DISABLE"] = "1"  # the lines below are the progress, in a log file too
    progress("loading PyTorch and Transformers")
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    progress("tokenizer")
    make_tokenizer(gguf).save_pretrained(target)
    progress("weights, 4 bit to bf16")
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.generation_config.update(**SAMPLING)
    try:
        model.save_pretrained(target)
    except SafetensorError as error:  # its word for a full disk
        raise ModelError(f"cannot write {target}: {error}") from error
    for path in target.iterdir():
        path.chmod(0o644)  # safetensors writes files that only the owner can read


def make_tokenizer(gguf: Path) -> Any:
    """The GGUF's tokenizer, with what its conversion in Transformers loses put back.

    Transformers takes the vocabulary, the merges and the template from a GGUF, and a GPT-2 default for the rest: an
    end-of-text token that is `<|im_start|>`, digits in runs and no context length. The pre-tokenizer that the GGUF
    names ("smollm") splits off every digit first, which matters after several blanks. The ids of the special tokens
    are the GGUF's own.
    """
    import transformers
    from tokenizers import decoders, pre_tokenizers

    parsed = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = parsed.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = None  # no BOS is added: the chat template writes every <|im_start|> itself
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=parsed.chat_template,
    )


def try_out(folder: Path, progress: Progress) -> None:
    """Ask the converted folder one question, as the engine will: a wrong conversion is never put in place."""
    import transformers

    progress(f"trying it: {QUESTION}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=32)[0]
    output_ids = ids[prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(output_ids, skip_special_tokens=True)
    if ANSWER not in answer or output_ids[-1] != tokenizer.eos_token_id:
        raise ModelError(f"the converted model answers {answer!r}: the conversion is wrong on this machine")
    progress(f"it answers: {answer}")
