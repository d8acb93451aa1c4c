"""The text side of the pipeline: messages to token ids, with the model's own chat template.

Knows nothing of Dynamo or HTTP. Long conversations are rendered and encoded in threads of their own, off the event
loop; short ones take less time than it would take to hand them to another thread and back.
"""

import asyncio
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import tokenizers

from common.arguments import Parsing
from common.errors import InvalidRequest
from common.openai.json_schema import check_grammar
from common.openai.request import ChatCompletionRequest
from common.openai.request_parts import Message, Tool
from common.sampling import ContextLimits
from common.text.chat_template import ChatTemplate
from common.text.readers import ReasoningForm
from common.text.special_tokens import MARK, LiteralSpecialTokens
from common.text.tool_call_parsers import check_parser
from common.text.vocabulary import Vocabulary, tokenizer_sha256
from common.wire import EngineDescription

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of one conversation: a pool of threads would only be handed it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A short conversation: encoding it takes 0.2 ms (English) to 1 ms (digits), and handing it over 0.2 ms or more. The
# characters are those of its JSON.
SHORT_CHARACTERS, SHORT_MESSAGES = 1200, 20
# Long ones side by side: 4,000 tokens take 10 to 25 ms, nearly all of it without the interpreter lock.
MAX_THREADS = 4
DEFAULT_PARSING = Parsing()
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ChatTokenizer:
    """One model's tokenizer and chat template.

    model: what an engine would say of the model. generation: what the model's generation_config.json recommends;
    sampling_defaults: as far as OpenAI has names for it. reasoning: how the model marks what it thinks before it
    answers; None where it does not. markup_ids: of special tokens that may be part of tool calls.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        model: EngineDescription,
        generation: dict[str, Any] | None = None,
        parsing: Parsing = DEFAULT_PARSING,
    ) -> None:
        self.backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocabulary = Vocabulary(self.backend)
        self.model = model
        chosen = {name: value for name, value in (generation or {}).items() if value is not None}
        self.sampling_defaults = {name: chosen[name] for name in _SAMPLING_DEFAULTS if name in chosen}
        # The special tokens without those that begin, end or fill a sequence.
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
        end_ids = chosen.get("eos_token_id", [])
        self.markup_ids = self.vocabulary.special_ids - {*named, *(end_ids if isinstance(end_ids, list) else [end_ids])}
        self.vocab_size = self.backend.get_vocab_size(with_added_tokens=True)
        self._longest_token = max(map(len, self.backend.get_vocab(with_added_tokens=True)))
        num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")
        self.template = ChatTemplate(tokenizer)
        self.reasoning = ReasoningForm.of(parsing.reasoning, self.vocabulary, str(tokenizer.chat_template))
        self.parsing = parsing
        self._literals = None if parsing.special_tokens else LiteralSpecialTokens(self.backend, self.template.example)

    @classmethod
    def load(cls, model: str, parsing: Parsing = DEFAULT_PARSING) -> "ChatTokenizer":
        """From a folder or a hub name.

        Raises:
            OSError, ValueError: there is no such model or parser, or it has no fast tokenizer or no chat template.
        """
        if parsing.has_foreign_calls:
            check_parser(str(parsing.tool_calls))
        transformers = _transformers_without_torch()
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        if not tokenizer.is_fast:
            raise ValueError(f"{model} has no fast tokenizer (tokenizer.json)")
        if not tokenizer.chat_template:
            raise ValueError(f"{model} has no chat template")
        config = transformers.AutoConfig.from_pretrained(model).get_text_config()
        description = EngineDescription(
            model,
            context_length=getattr(config, "max_position_embeddings", 0) or 2048,
            vocab_size=getattr(config, "vocab_size", len(tokenizer)),
            tokenizer_sha256=tokenizer_sha256(model),
        )
        generation = None
        with suppress(OSError):  # many models recommend nothing
            generation = transformers.GenerationConfig.from_pretrained(model).to_diff_dict()
        return cls(tokenizer, model=description, generation=generation, parsing=parsing)

    async def check(self, request: ChatCompletionRequest) -> None:
        """Raises:
        InvalidRequest: it names a token that the model does not have, tools that it cannot choose to call, a value
        for the template that is not the client's, or a schema that has no grammar.
        """
        if request.usable_tools and not request.max_forced_calls:
            self._check_free_calls()
        for name in request.chat_template_kwargs.keys() & self.template.reserved_names:
            raise InvalidRequest(
                f"Invalid value for chat_template_kwargs: {name} is not the client's to choose.",
                param=f"chat_template_kwargs.{name}",
            )
        self._check_known("logit_bias", map(int, request.logit_bias or ()))
        self._check_known("stop_token_ids", request.stop_token_ids)
        if request.answer_schema is not None:
            try:
                await check_grammar(request.answer_schema, request.answer_schema_param)
            except InvalidRequest:
                for param, schema in request.forced_parameters.items():  # which of the tools is it?
                    await check_grammar(schema, param)
                raise

    def _check_known(self, param: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if token_id >= self.vocab_size:
                raise InvalidRequest(
                    f"Invalid value for {param}: the model has {self.vocab_size} tokens, and {token_id} is none of "
                    "them.",
                    param=param,
                )

    def _check_free_calls(self) -> None:
        template = self.template
        if not (template.takes_tools and (template.is_hermes or self.parsing.tool_calls)):
            reason = "writes calls in a form that needs --tool-call-parser" if template.takes_tools else "takes none"
            raise InvalidRequest(
                f"Invalid value for tools: this model's chat template {reason}, so it cannot choose to call one. "
                'With tool_choice "required", or with the name of one, it is made to.',
                param="tools",
            )

    async def encode_chat(self, request: ChatCompletionRequest, limits: ContextLimits) -> list[int]:
        """The prompt's token ids, ending where the assistant's answer begins.

        Raises:
            InvalidRequest: the template does not take these messages. ContextLengthExceeded: too many tokens.
        """
        if _is_short(request):
            token_ids = self._encode(request, limits)
        else:
            loop = asyncio.get_running_loop()
            token_ids = await loop.run_in_executor(self._threads, self._encode, request, limits)
        limits.check_prompt(len(token_ids))
        return token_ids

    def _encode(self, request: ChatCompletionRequest, limits: ContextLimits) -> list[int]:
        given = self.template.given(request)
        prompt, encoder = self.template.render(*given), self.backend
        if len(prompt) > limits.max_input_tokens * self._longest_token:  # not worth a tokenizer's time
            raise limits.exceeded(
                f"Your messages make a prompt of {len(prompt)} characters, at least "
                f"{len(prompt) // self._longest_token} tokens."
            )
        if self._literals and (marked := self._literals.marked(*given)) != given:
            plain_prompt, prompt, encoder = prompt, self.template.render(*marked), self._literals.encoder
            if prompt.replace(MARK, "") != plain_prompt:  # the template looks for special tokens in the messages
                raise InvalidRequest(
                    "The messages contain a special token of the model, which its chat template does not take as text.",
                    param="messages",
                )
        # The template alone decides on special tokens: adding them here would begin the sequence twice. All that
        # transformers' own `tokenize=True` does beyond this is to note the characters' offsets.
        (encoding,) = encoder.encode_batch_fast([prompt], add_special_tokens=False)
        token_ids: list[int] = encoding.ids
        return token_ids


def _is_short(request: ChatCompletionRequest) -> bool:
    """Whether all the text that a template may render is short, such as the arguments of tools."""
    texts: list[Message | Tool] = [*request.messages, *request.usable_tools]
    return (
        len(texts) <= SHORT_MESSAGES
        and sum(len(text.model_dump_json(exclude_none=True)) for text in texts) <= SHORT_CHARACTERS
    )


def _transformers_without_torch() -> Any:
    """The module transformers, kept from importing PyTorch: that takes seconds and 600 MB, and no tokenizer needs it.

    transformers has no setting for that. It asks once, while it is imported, whether there is a module torch; None in
    `sys.modules` tells it that there is not. Where torch or transformers is imported already, both stay as they are.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn of having no PyTorch
    modules: dict[str, Any] = sys.modules
    modules.setdefault("torch", None)
    import transformers

    if modules["torch"] is None:
        del modules["torch"]
    return transformers
