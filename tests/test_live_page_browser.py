"""The live page in a real browser: what it shows of a pipeline that changes, and what it does with what it is told."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browsers import chromium
from tests.frontends import frontend_beside
from tests.model_copies import make_thinking_model
from tests.processes import SHORT_LEASE, Pipeline, new_pipeline, running, wait_until

pytestmark = [
    pytest.mark.browser,
    pytest.mark.process,
    pytest.mark.needs("chromium"),
]

ATTACK = "<img src=x onerror=\"document.title='owned'\">"
MODEL_NAME = f"echo {ATTACK}"
PATIENCE_MS = 30_000  # a machine may be busy
LONG = "one two three four five six seven eight nine ten " * 12  # six seconds
# The lengths that the second text of the conversation, which is the answer, has had.
NOTE_LENGTHS = """
    globalThis.lengths = new Set();
    const note = () => lengths.add(document.querySelectorAll(".turn .text")[1]?.textContent.length);
    const anything = {subtree: true, childList: true, characterData: true};
    new MutationObserver(note).observe(document.getElementById("log"), anything);
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory, embedded_model: str) -> Iterator[Pipeline]:
    """A pipeline that says what it is told, 20 tokens a second, under a model name that is an attack itself."""
    with new_pipeline(tmp_path_factory.mktemp("page"), env=SHORT_LEASE) as pipeline:
        start_engine(pipeline)
        pipeline.processor("--served-model-name", MODEL_NAME)
        pipeline.frontend()
        pipeline.wait_ready()
        yield pipeline


def start_engine(pipeline: Pipeline) -> Any:
    return pipeline.fake_engine(
        "--echo", "--can-constrain", "--token-interval-ms", "50", "--kv-events", "--cache-blocks", "10"
    )


@dataclass
class Watched:
    """A page, and what it did behind the scenes."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))
        self.page.on(
            "request", lambda request: self.bodies.append(request.post_data_json) if request.post_data else None
        )

    def open(self, url: str) -> Page:
        self.page.goto(url)
        expect(self.page.locator("#frontend .box")).to_have_count(1)
        return self.page

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.keyboard.press("Enter")


@pytest.fixture
def watched(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Watched]:
    context = browser.new_context(**getattr(request, "param", {}))
    context.set_default_timeout(PATIENCE_MS)
    yield Watched(context.new_page())
    context.close()


def boxes(page: Page, tier: str) -> Any:
    return page.locator(f"#{tier} .box:not(.is-gone)")


def milliseconds(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"ms": 1, "s": 1000}[unit]


def test_a_question_that_comes_before_the_models_waits_for_them(watched: Watched, echo: Pipeline) -> None:
    watched.page.route("**/v1/models", lambda route: route.abort(), times=1)
    page = watched.open(echo.url)
    watched.ask("one two three")
    expect(page.locator(".turn .text").nth(1)).to_have_text(re.compile("one two three"))
    assert [body["model"] for body in watched.bodies] == [MODEL_NAME]


def test_it_loads_without_a_complaint_and_without_another_host(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    expect(boxes(page, "processors")).to_have_count(1)
    expect(boxes(page, "engines")).to_have_count(1)
    expect(page.get_by_label("Model")).to_have_value(MODEL_NAME)
    wait_until(lambda: bool(page.wait_for_timeout(50)) or watched.urls.count(f"{echo.url}/pipeline") > 2, 10, "polling")
    assert watched.complaints == []
    assert {re.sub(r"(//[^/]*).*", r"\1", url) for url in watched.urls if not url.startswith("data:")} == {echo.url}


def test_the_boxes_have_the_names_of_etcds_keys(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    for tier, endpoint in (("processors", "processor/process"), ("engines", "engine/generate")):
        [key] = echo.infra.instance_keys(endpoint)
        expect(boxes(page, tier).locator("code")).to_have_text(re.split("[:/]", key)[-1])
    expect(boxes(page, "frontend").locator("code")).to_have_text(f"pid {echo.processes[2].pid}")


def test_an_answer_streams_and_then_shows_its_path(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    page.evaluate(NOTE_LENGTHS)
    watched.ask("Ten words that come one after the other, at their ease, slowly.")
    expect(page.locator(".path")).to_have_count(1)
    expect(page.locator(".turn .text").nth(1)).to_have_text(re.compile("^Ten words.* slowly.$"))
    assert page.evaluate("lengths.size") > 5, "it came in one piece"
    whos = page.locator(".path .who").all_inner_texts()
    instances = {tier: boxes(page, tier).locator("code").inner_text() for tier in ("frontend", "processors", "engines")}
    assert whos == [
        f"frontend {instances['frontend']}",
        "frontend to processor",
        f"processor {instances['processors']}",
        "processor to engine",
        *[f"engine {instances['engines']}"] * 2,
        "back to you",
    ]
    times = [milliseconds(text) for text in page.locator(".path .ms").all_inner_texts()]
    in_all = re.match(r"(\S+ m?s) in all", page.locator(".path summary").inner_text())
    assert in_all
    assert sum(times) == pytest.approx(milliseconds(in_all[1]), abs=15)  # as rounded as they are shown
    assert times[5] > 500  # a dozen tokens, 50 ms apart
    expect(page.locator(".box.is-on-path")).to_have_count(3)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert watched.complaints == []


def test_a_second_question_goes_with_the_first_and_its_answer(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    watched.ask("first")
    expect(page.locator(".path")).to_have_count(1)
    watched.ask("second")
    expect(page.locator(".path")).to_have_count(2)
    assert [(message["role"], message["content"]) for message in watched.bodies[1]["messages"]] == [
        ("user", "first"),
        ("assistant", "first"),
        ("user", "second"),
    ]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    watched.ask("third")
    expect(page.locator(".path")).to_have_count(1)
    assert len(watched.bodies[2]["messages"]) == 1


def test_stop_stops_the_engine_and_the_chat_goes_on(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    num_stopped = echo.processes[0].log.count("stopped True")
    watched.ask(LONG)
    expect(page.locator(".turn .text").nth(1)).to_have_text(re.compile("^one two"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".note")).to_have_text("Stopped.")
    wait_until(lambda: echo.processes[0].log.count("stopped True") > num_stopped, 20, "the engine to stop")
    watched.ask("and now?")
    expect(page.locator(".path")).to_have_count(1)
    assert [message["role"] for message in watched.bodies[1]["messages"]] == ["user", "assistant", "user"]


def test_what_model_and_workers_say_stays_text(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    watched.ask(ATTACK)
    expect(page.locator(".path")).to_have_count(1)
    assert page.locator(".turn .text").all_inner_texts() == [ATTACK, ATTACK]
    expect(page.locator(".turn .who").nth(1)).to_have_text(MODEL_NAME)
    expect(boxes(page, "processors").locator(".detail")).to_have_text(MODEL_NAME)
    assert page.locator("img").count() == 0
    assert page.title() == "Chat completions on Dynamo"
    assert watched.complaints == []


def test_even_a_mistake_in_the_page_could_not_run_it(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    outcome = page.evaluate(
        "text => { try { document.body.innerHTML = text; } catch (error) { return error.name; } }", ATTACK
    )
    assert outcome == "TypeError"  # trusted types
    assert page.title() == "Chat completions on Dynamo"


def test_an_engine_comes_answers_in_the_others_place_and_is_forgotten(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    first = boxes(page, "engines").locator("code").inner_text()
    second_engine = start_engine(echo)
    expect(boxes(page, "engines")).to_have_count(2)
    expect(page.get_by_role("status")).to_have_text(re.compile("^engine [0-9a-f]+ is there: 1 processor, 2 engines$"))
    second = (set(boxes(page, "engines").locator("code").all_inner_texts()) - {first}).pop()
    expect(page.get_by_label("Model")).to_have_value(MODEL_NAME)
    watched.ask(LONG)
    expect(page.locator(".turn .text").nth(1)).to_have_text(re.compile("^one two"))
    log = second_engine.log
    broken, left = (second, first) if "running 1" in log and "running 0" not in log else (first, second)
    (second_engine if broken == second else echo.processes[0]).kill()
    expect(page.locator(".path")).to_have_count(1)
    rows = list(zip(*(page.locator(f".path .{name}").all_inner_texts() for name in ("who", "what")), strict=True))
    assert (f"engine {broken}", "broke off") in rows
    assert (f"engine {left}", "its other tokens") in rows
    assert page.locator(".turn .text").nth(1).inner_text().endswith(LONG.strip())  # this engine begins anew
    expect(boxes(page, "engines")).to_have_count(1)
    expect(boxes(page, "engines").locator("code")).to_have_text(left)
    expect(page.get_by_role("status")).to_have_text(f"engine {broken} is gone: 1 processor, 1 engine")
    assert watched.complaints == []
    if not echo.processes[0].is_alive:  # the other tests read its log
        echo.processes[0] = echo.processes.pop()


def test_a_frontend_that_is_gone_and_back_is_seen(watched: Watched, echo: Pipeline, tmp_path: Path) -> None:
    with frontend_beside(echo, tmp_path) as beside:
        page = watched.open(beside.url)
        beside.processes[0].kill()
        expect(page.get_by_role("status")).to_have_text("The frontend does not answer.")
        beside.processes[0].start()
        expect(page.get_by_role("status")).to_have_text(re.compile("1 processor, 1 engine$"))
        expect(boxes(page, "frontend").locator("code")).to_have_text(f"pid {beside.processes[0].pid}")


def test_it_asks_for_a_key_where_one_is_needed(watched: Watched, echo: Pipeline, tmp_path: Path) -> None:
    with frontend_beside(echo, tmp_path, "--api-key", "secret") as keyed:
        page = watched.page
        page.goto(keyed.url)
        expect(page.get_by_role("status")).to_have_text("This frontend wants an API key.")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("wrong")
        watched.ask("Hello!")
        expect(page.locator(".note.is-bad")).to_have_text(re.compile("Missing or wrong API key"))
        expect(page.get_by_label("Message")).to_have_value("Hello!")
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(boxes(page, "engines")).to_have_count(1)
        expect(page.get_by_label("Model")).to_have_value(MODEL_NAME)
        watched.ask("Hello!")
        expect(page.locator(".path")).to_have_count(1)
        assert "secret" not in page.evaluate(
            "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        )


PHONE = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}


@pytest.mark.parametrize("watched", [PHONE], indirect=True, ids=["phone"])
def test_nothing_sticks_out_on_a_phone(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    watched.ask("word" * 40)
    expect(page.locator(".path")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", background))) < 3 * 64, "dark was asked for"


def test_thoughts_are_shown_apart_from_the_answer(watched: Watched, echo: Pipeline, tmp_path: Path) -> None:
    model = make_thinking_model(tmp_path / "thinking", is_open=False)
    with running(echo.script("processor.py", "--model", str(model), "--served-model-name", "thinking")):
        echo.wait_ready(processors=2)
        page = watched.open(echo.url)
        page.get_by_label("Model").select_option("thinking")
        watched.ask("<think>Let me see.</think>Yes.")
        expect(page.locator(".path")).to_have_count(1)
        assert page.locator(".thoughts").all_inner_texts() == ["Let me see."]
        expect(page.locator(".turn .text").nth(1)).to_have_text("Yes.")
        watched.ask("Why?")
        expect(page.locator(".path")).to_have_count(2)
        assert watched.bodies[1]["messages"][1] == {"role": "assistant", "content": "Yes."}
        assert watched.complaints == []
    echo.processes.pop()


def test_the_boxes_show_what_caches_have_in_common_and_a_path_shows_the_routers_choice(
    watched: Watched, echo: Pipeline
) -> None:
    page = watched.open(echo.url)
    details = boxes(page, "engines").locator(".detail")

    def ask_anew() -> list[tuple[str, str]]:
        page.get_by_role("button", name="New chat").click()
        watched.ask("word " * 60)
        expect(page.locator(".path")).to_have_count(1)
        steps = (page.locator(f".path .of-router .{part}").all_inner_texts() for part in ("who", "what"))
        return list(zip(*steps, strict=True))

    def is_routed_to_what_is_cached() -> bool:
        chosen = [what for who, what in ask_anew() if re.fullmatch("router [0-9a-f]+", who)]
        return any(re.fullmatch(r"chose an engine with (48|64|80) tokens cached", what) for what in chosen)

    page.get_by_label("Tokens at most").fill("1")
    expect(details).to_have_text(re.compile(r"^\d+ tokens cached, \d+ % full$"))
    with running(start_engine(echo)):
        expect(details).to_have_count(2)
        for _ in range(2):  # by turns, so that both have it
            assert ask_anew() == []
        shared = re.compile(r"^\d+ tokens cached, [1-9]\d+ % full, [1-9]\d* % also elsewhere$")
        expect(details).to_have_text([shared, shared])
        with running(echo.router()):
            wait_until(is_routed_to_what_is_cached, PATIENCE_MS / 1000, "a router")
    assert watched.complaints == []


def test_json_is_shown_with_a_line_for_each_value_as_it_comes(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    page.get_by_label("Answer").select_option("JSON")
    page.evaluate(NOTE_LENGTHS)
    said = '{"city":"Rome, {Italy}","big":12345678901234567890,"none":[],"all":[1.0,{"x":"\\"<"}]}'
    watched.ask(said)
    expect(page.locator(".path")).to_have_count(1)
    assert page.evaluate("lengths.size") > 5, "it came in one piece"
    shown = page.locator(".turn .text").nth(1).inner_text()
    assert shown.splitlines() == [
        "{", '  "city": "Rome, {Italy}",', '  "big": 12345678901234567890,', '  "none": [],', '  "all": [', "    1.0,",
        "    {", '      "x": "\\"<"', "    }", "  ]", "}",
    ]  # fmt: skip
    assert watched.bodies[0]["response_format"]["type"] == "json_schema"
    page.get_by_label("Answer").select_option("text")
    watched.ask("Why?")
    expect(page.locator(".path")).to_have_count(2)
    assert watched.bodies[1]["messages"][1] == {"role": "assistant", "content": said}
    assert "response_format" not in watched.bodies[1]
    assert watched.complaints == []


def test_a_call_is_shown_as_one_and_the_next_message_is_what_the_tool_returns(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    page.get_by_label("Answer").select_option("tool call")
    arguments = ['{"city": "Rome"}', f'{{"city": {json.dumps(ATTACK)}}}']
    said = ", ".join(f'{{"name": "weather", "arguments": {each}}}' for each in arguments)
    watched.ask(f"[{said}]")
    expect(page.locator(".path")).to_have_count(1)
    calls = page.locator(".call").all_inner_texts()
    assert calls[0].splitlines() == ["weather({", '  "city": "Rome"', "})"]
    assert ATTACK in json.loads(calls[1].removeprefix("weather(").removesuffix(")")).values()
    for result in ("Sunny.", "Rain."):
        expect(page.get_by_placeholder("What weather returns")).to_be_visible()
        watched.ask(result)
    expect(page.locator(".path")).to_have_count(2)
    expect(page.get_by_placeholder("Your message")).to_be_visible()
    assert page.locator(".turn > .who").all_inner_texts()[2:4] == ["weather returned"] * 2
    assert watched.bodies[1]["tool_choice"] == "none"
    _, called, *results = watched.bodies[1]["messages"]
    assert [call["function"]["arguments"] for call in called["tool_calls"]] == arguments
    assert [(turn["role"], turn["tool_call_id"], turn["content"]) for turn in results] == [
        ("tool", call["id"], text) for call, text in zip(called["tool_calls"], ("Sunny.", "Rain."), strict=True)
    ]
    assert watched.complaints == []


def test_fields_that_are_no_json_are_not_sent(watched: Watched, echo: Pipeline) -> None:
    page = watched.open(echo.url)
    page.get_by_label("Answer").select_option("JSON")
    page.get_by_label("Fields").fill("{")
    watched.ask("Hello!")
    expect(page.locator(".note.is-bad")).to_have_text(re.compile("^The fields of the request are not JSON"))
    expect(page.get_by_label("Message")).to_have_value("Hello!")
    assert watched.bodies == []
