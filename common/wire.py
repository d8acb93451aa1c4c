"""The dicts that cross NATS, each as one type: the only module that knows their keys.

    frontend  -> processor  the OpenAI request as it came, plus "request_id" and "traceparent"
    processor -> frontend   {"content": ...}, then {"finish_reason": ..., "usage": ...}     ProcessorChunk
    processor -> engine     {"token_ids", "sampling_options", "stop_conditions", ...}       EngineRequest
    engine    -> processor  {"token_ids": [new ids]}, then {"finish_reason": ...}           EngineChunk
    processor -> router     {"token_ids", "worker_ids"}                                   WorkerQuestion
    router    -> processor  {"worker_id", "num_cached_tokens"}                            WorkerFound
    engine    -> router     {"events": [...]}, what is cached and then each change        KvEvents
    either way              {"error": {"message", "type", "param", "code"}}

These are the chapter's dicts. Everything beyond them has a default, so that a worker which only knows the chapter
still works on every hop. `{"describe": true}` asks a worker what it serves; one that does not know the question
answers with an error and is accepted unchecked. `"show_path": true` in a request asks a worker to tell in its last
dict how the request went; one that does not know that leaves it out.
"""

from typing import Annotated, Any, ClassVar, Literal, Self, TypedDict, TypeVar

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from common.errors import BadUpstream, InvalidRequest, ModelNotFound, from_wire

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
FinishReason = Literal["stop", "length"]
AnswerFinishReason = Literal["stop", "length", "tool_calls"]
InstanceId = Annotated[str, Meta(pattern="^[0-9a-f]{1,16}$")]
# Since a process received the request, in microseconds.
Moment = Annotated[int, Meta(ge=0, lt=2**53)]
DESCRIBE: dict[str, Any] = {"describe": True}
KV_BLOCK_SIZE = 16  # tokens: what routers count caches and prompts in
NUM_LOWEST_HASHES = 500
SCHEMA_PARAM = "sampling_options.json_schema"  # as an engine's error names it, which knows no client's fields
MAX_CALLS = 1024  # of one worker for one request, all choices and attempts counted


class SamplingOptions(msgspec.Struct, omit_defaults=True):
    """How to choose a token. None means the engine's own default.

    json_schema: the text of a schema. The answer is JSON that it describes, unless `max_tokens` cuts it off.
    num_json_tokens: so many of the request's last token_ids are the beginning of that JSON.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    json_schema: str | None = None
    num_json_tokens: Annotated[int, Meta(ge=0)] = 0


class StopConditions(msgspec.Struct, omit_defaults=True):
    """When to end. `max_tokens` counts new tokens, the end-of-sequence token included.

    stop_token_ids end it as the end of sequence does. min_tokens: before so many new tokens, neither is chosen.
    """

    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] = 0
    stop_token_ids: list[TokenId] = []
    ignore_eos: bool = False


class OutputOptions(msgspec.Struct, omit_defaults=True):
    """What to send back. `logprobs`: None for none, 0 for the chosen tokens', N for the N best as well.

    `stream` false allows the engine to send the whole answer in one dict.
    """

    stream: bool = True
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class Request(msgspec.Struct, omit_defaults=True):
    """A question to a worker. called: how an error names it."""

    called: ClassVar[str]

    @classmethod
    def read(cls, data: Any) -> Self:
        """Raises:
        InvalidRequest: the dict is none.
        """
        try:
            return msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"This is not {cls.called}: {error}.") from error


class EngineRequest(Request, omit_defaults=True):
    called = "an engine request"

    token_ids: Annotated[list[TokenId], Meta(min_length=1)]
    sampling_options: SamplingOptions = msgspec.field(default_factory=SamplingOptions)
    stop_conditions: StopConditions = msgspec.field(default_factory=StopConditions)
    output_options: OutputOptions = msgspec.field(default_factory=OutputOptions)


def is_constrained(request: dict[str, Any]) -> bool:
    """Whether an engine request has a grammar."""
    return request.get("sampling_options", {}).get("json_schema") is not None


class WorkerQuestion(Request, omit_defaults=True):
    """Which of these workers shall answer the prompt? It is booked for as long as the stream of the answer is open.

    tokens_hashes: of the prompt's blocks, 8 bytes each, in place of its token_ids; num_tokens: how many those are. For
    routers that have said that they take it.
    """

    called = "a question for a worker"

    worker_ids: Annotated[list[int], Meta(min_length=1)]
    token_ids: list[TokenId] = []
    num_tokens: Annotated[int, Meta(ge=0)] = 0
    tokens_hashes: bytes = b""

    def __post_init__(self) -> None:
        has_hashes = self.num_tokens and len(self.tokens_hashes) == self.num_tokens // KV_BLOCK_SIZE * 8
        if bool(self.token_ids) == bool(has_hashes):
            raise ValueError("either token_ids, or num_tokens and the hashes of their blocks")

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.token_ids) or self.num_tokens


class WorkerFound(msgspec.Struct, omit_defaults=True):
    """num_cached_tokens: of the prompt, found in that worker's cache.

    hashed_block_size: the router takes `tokens_hashes` of such blocks, too; 0: it does not.
    """

    worker_id: int
    num_cached_tokens: int = 0
    hashed_block_size: int = 0


class RouterDescription(msgspec.Struct, omit_defaults=True):
    """What a router says of itself when asked."""

    policy: str


class KvBlock(msgspec.Struct):
    """tokens_hash: of its own tokens. block_hash: of the block and all before it, by `chained_hashes`. 64 bits each."""

    block_hash: int
    tokens_hash: int


class BlocksStored(msgspec.Struct):
    """Blocks of one sequence, in order. parent_hash: of the block before them; None where there is none."""

    parent_hash: int | None
    blocks: list[KvBlock]


class BlocksRemoved(msgspec.Struct):
    block_hashes: list[int]


class KvEvent(msgspec.Struct, omit_defaults=True):
    """A change of what an engine has cached, as Dynamo's index reads it."""

    stored: BlocksStored | None = None
    removed: BlocksRemoved | None = None


class KvEvents(msgspec.Struct):
    events: list[KvEvent]


class RouteTrace(msgspec.Struct):
    """How a router came to be followed. took_us: from the question to its answer."""

    router: InstanceId
    took_us: Moment
    num_cached_tokens: int


class CallTrace(msgspec.Struct, omit_defaults=True):
    """A call of one instance, as its caller saw it. `instance`: its id as etcd's key has it, in hexadecimal.

    first_us, last_us: when its first and its last dict came. is_broken: it ended midway, and another one was called.
    route: how it was chosen, where a router chose it. stage: what it tells of itself.
    """

    instance: InstanceId
    called_us: Moment
    first_us: Moment | None = None
    last_us: Moment | None = None
    is_broken: bool = False
    route: RouteTrace | None = None
    stage: "HopTrace | None" = None


class HopTrace(msgspec.Struct, omit_defaults=True):
    """One process' share of a request: when its first and its last dict left, and whom it called.

    A worker that was asked for it puts this into its terminal dicts, as "path"; the last one counts.
    """

    first_us: Moment | None = None
    last_us: Moment | None = None
    calls: Annotated[list[CallTrace], Meta(max_length=MAX_CALLS)] = []


class Chunk(msgspec.Struct, omit_defaults=True, kw_only=True):
    """An item of an answer. sender: how an error names who sends it."""

    sender: ClassVar[str]

    path: HopTrace | None = None
    error: Any = None

    def data(self) -> Self:
        """The chapter's way to what is in it."""
        return self

    @classmethod
    def read(cls, data: Any) -> Self:
        """Raises:
        PipelineError: the sender reports an error, or the dict is not part of the protocol (BadUpstream).
        """
        try:
            chunk = msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise BadUpstream(f"The {cls.sender} sent something that is not part of the protocol ({error}).") from error
        if chunk.error is not None:
            raise from_wire(chunk.error)
        return chunk

    @classmethod
    def rest_of(cls, request: dict[str, Any], delivered: list[Self]) -> dict[str, Any] | Self | None:
        """The request for what is left after `delivered`, or the chunk that ends the answer where nothing is left.

        None where a broken answer cannot go on.
        """
        return None


class EngineChunk(Chunk, omit_defaults=True):
    """Some new tokens, the reason for the end, or both (then the tokens come first).

    token_ids: new ids only, length >= 0.
    log_probs: one per token, natural logarithm. top_logprobs: for each token its best (token id, logprob) pairs.
    cached_tokens: how many of the prompt's the engine had in its cache; with the finish_reason, if it tells.
    """

    sender = "engine"

    token_ids: list[TokenId] = []
    finish_reason: FinishReason | None = None
    log_probs: list[float] | None = None
    top_logprobs: list[list[tuple[TokenId, float]]] | None = None
    cached_tokens: Annotated[int, Meta(ge=0)] | None = None

    @property
    def has_content(self) -> bool:
        return bool(self.token_ids)

    @property
    def may_wait(self) -> bool:
        """Whether it is a lone token: an engine that sends several at once has chosen its pace itself."""
        return len(self.token_ids) == 1 and self.finish_reason is None and self.log_probs is None

    def add(self, other: "EngineChunk") -> None:
        """Append what comes next. Neither has logprobs."""
        self.token_ids += other.token_ids
        self.finish_reason, self.cached_tokens, self.path = other.finish_reason, other.cached_tokens, other.path

    @classmethod
    def read(cls, data: Any) -> Self:
        chunk = super().read(data)
        for per_token in (chunk.log_probs, chunk.top_logprobs):
            if per_token is not None and len(per_token) != len(chunk.token_ids):
                raise BadUpstream("The engine sent logprobs that do not match its tokens.")
        return chunk

    @classmethod
    def rest_of(cls, request: dict[str, Any], delivered: list[Self]) -> dict[str, Any] | Self:
        """The tokens become part of the prompt.

        SGLang derives a token's randomness from the seed and its position, so a seeded answer goes on as it would
        have. Penalties start anew. Where nothing is left to generate, it is the chunk that ends the answer.
        """
        token_ids = [token_id for chunk in delivered for token_id in chunk.token_ids]
        stop = request.get("stop_conditions", {})
        if (max_tokens := stop.get("max_tokens")) is not None:
            stop = {**stop, "max_tokens": max_tokens - len(token_ids)}
            if min_tokens := stop.get("min_tokens"):
                stop["min_tokens"] = max(0, min_tokens - len(token_ids))
            if stop["max_tokens"] < 1:
                return cls(finish_reason="length")
        if is_constrained(request):
            options = request["sampling_options"]
            num_json_tokens = options.get("num_json_tokens", 0) + len(token_ids)
            request = {**request, "sampling_options": {**options, "num_json_tokens": num_json_tokens}}
        return {**request, "token_ids": [*request["token_ids"], *token_ids], "stop_conditions": stop}


class CacheDescription(msgspec.Struct):
    """What an engine has cached now, in tokens, and at most.

    lowest_block_hashes: NUM_LOWEST_HASHES of them, or all: a sample that is alike where two caches are.
    """

    num_tokens: int
    max_num_tokens: int
    lowest_block_hashes: list[int]


class EngineDescription(msgspec.Struct, omit_defaults=True):
    """What an engine says of itself when asked. `context_length` in tokens, prompt and answer together.

    vocab_size: rows of the model's embedding. tokenizer_sha256: see `vocabulary`; "" where it is not known.
    max_input_tokens: the longest prompt that it takes; None: all that leave room for a token. can_constrain: whether it
    takes a `json_schema`. cache: None where it does not follow what it has cached.
    """

    model: str
    context_length: int
    vocab_size: int
    is_seed_supported: bool = False
    tokenizer_sha256: str = ""
    max_input_tokens: int | None = None
    can_constrain: bool = False
    cache: CacheDescription | None = None


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct, omit_defaults=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionTokensDetails | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class TokenLogprob(TypedDict):
    """A token, its logprob, and its UTF-8 bytes, None where it has none of its own."""

    token: str
    logprob: float
    bytes: list[int] | None


class LogprobEntry(TokenLogprob):
    """OpenAI's entry for one token of the text."""

    top_logprobs: list[TokenLogprob]


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """A piece of a choice's tool call number `index`: its name first, then the JSON of its arguments, in pieces."""

    index: Annotated[int, Meta(ge=0)]
    name: str | None = None
    arguments: str = ""


class ProcessorChunk(Chunk, omit_defaults=True):
    """A piece of one choice's text, the end of that choice, or both. `usage` comes with the last chunk of all.

    logprobs: one entry for each token behind it. The reasoning comes before the content, calls of tools behind it.
    """

    sender = "processor"

    index: Annotated[int, Meta(ge=0)] = 0
    content: str = ""
    finish_reason: AnswerFinishReason | None = None
    logprobs: list[LogprobEntry] | None = None
    usage: Usage | None = None
    tool_calls: list[ToolCallDelta] = []
    reasoning_content: str = ""

    @property
    def has_content(self) -> bool:
        return bool(self.content or self.reasoning_content or self.logprobs or self.tool_calls)

    @property
    def may_wait(self) -> bool:
        return False

    def add(self, other: "ProcessorChunk") -> None:
        """Append what comes next of the same choice."""
        self.content += other.content
        self.reasoning_content += other.reasoning_content
        self.tool_calls += other.tool_calls
        self.finish_reason = other.finish_reason or self.finish_reason
        if other.logprobs is not None:
            self.logprobs = (self.logprobs or []) + other.logprobs


class ProcessorDescription(msgspec.Struct, omit_defaults=True):
    """The model names that a processor answers to, and since when (Unix seconds).

    root: the model behind them, a folder or a hub name. context_length: in tokens; the smallest of its engines'.
    """

    models: list[str]
    created: int
    root: str = ""
    context_length: int | None = None

    def together_with(self, other: "ProcessorDescription") -> "ProcessorDescription":
        lengths = [each.context_length for each in (self, other) if each.context_length is not None]
        return replace(self, created=min(self.created, other.created), context_length=min(lengths, default=None))

    def check(self, model: str) -> None:
        """Raises:
        ModelNotFound: it answers to other names.
        """
        if model not in self.models:
            raise ModelNotFound(f"The model '{model}' does not exist.", param="model")


C = TypeVar("C", EngineChunk, ProcessorChunk)


def to_wire(message: msgspec.Struct) -> dict[str, Any]:
    """The dict for a message, without what is at its default."""
    wire: dict[str, Any] = msgspec.to_builtins(message)
    return wire


class Envelope(msgspec.Struct, omit_defaults=True):
    """What travels with every request beside what is asked: its id, for the logs, and its W3C traceparent.

    show_path: tell in the last dict how the request went.
    """

    request_id: str = ""
    traceparent: str = ""
    show_path: bool = False

    def around(self, request: dict[str, Any]) -> dict[str, Any]:
        return request | to_wire(self)

    @classmethod
    def taken_from(cls, request: dict[str, Any]) -> "Envelope":
        """Removes its keys from the request's dict."""
        request_id, traceparent = (str(request.pop(name, "")) for name in ("request_id", "traceparent"))
        return cls(request_id, traceparent, bool(request.pop("show_path", False)))
