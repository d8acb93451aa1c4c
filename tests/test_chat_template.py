"""What templates make of tools, and what is made of messages for templates that know nothing of them."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.text.chat_template import ChatTemplate
from tests.model_copies import TEMPLATE as HERMES
from tests.tokenizers_for_tests import byte_level

PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
OTHER_FORM = """\
{{ tools }}{% for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function.name }}<arg>{{ call.function.arguments }}
{%- endfor %}
{% endfor %}"""
# As some do that were written for OpenAI's own messages.
ARGUMENTS_AS_TEXT = """\
{% for message in messages %}{% for call in message.tool_calls or [] %}
{{- call.function.name + " " + call.function.arguments }}{% endfor %}{{ message.content }}
{% endfor %}"""
PICKY = "{% if messages[0].content != 'Hi!' %}{{ raise_exception('no') }}{% endif %}Hi!"

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Of a city.", "parameters": {"type": "object", "properties": {}}},
}


def template_of(text: str) -> ChatTemplate:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def asked(*, system: str = "", arguments: str = '{"city": "Rome"}', **fields: Any) -> ChatCompletionRequest:
    """A request after a tool was called, once."""
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    return parse_chat_request({"model": "m", "messages": messages, "tools": [WEATHER]} | fields)


def prompt_of(template: ChatTemplate, request: ChatCompletionRequest) -> str:
    return template.render(*template.given(request))


@pytest.mark.parametrize(
    ("text", "takes_tools", "takes_calls", "is_hermes"),
    [
        (HERMES, True, True, True),
        (PLAIN, False, False, False),
        (OTHER_FORM, True, True, False),
        (ARGUMENTS_AS_TEXT, False, True, False),
        (PICKY, False, False, False),
    ],
    ids=["Hermes", "plain", "another form", "arguments as text", "picky"],
)
def test_what_a_template_takes_is_told_from_what_it_renders(
    text: str, takes_tools: bool, takes_calls: bool, is_hermes: bool
) -> None:
    template = template_of(text)
    assert (template.takes_tools, template.takes_calls, template.is_hermes) == (takes_tools, takes_calls, is_hermes)


def test_a_template_that_takes_tools_gets_them_and_the_arguments_of_calls_as_objects() -> None:
    prompt = prompt_of(template_of(HERMES), asked())
    assert '{"type": "function", "function": {"name": "weather", "description": "Of a city."' in prompt
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>' in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt


def test_a_template_that_concatenates_arguments_gets_their_text() -> None:
    assert 'weather {"city": "Rome"}' in prompt_of(template_of(ARGUMENTS_AS_TEXT), asked())


def test_arguments_that_are_no_json_object_stay_what_the_model_wrote() -> None:
    template = template_of(HERMES)
    assert '"arguments": "{\\"city\\": "' in prompt_of(template, asked(arguments='{"city": '))
    assert '"arguments": "[1]"' in prompt_of(template, asked(arguments="[1]"))
    assert '"arguments": {}' in prompt_of(template, asked(arguments=""))


def test_a_template_without_tools_has_them_in_a_system_message_and_calls_as_they_are_forced() -> None:
    prompt = prompt_of(template_of(PLAIN), asked())
    assert prompt.startswith("system: You can call these functions:\n")
    assert '{"name": "weather", "description": "Of a city.", "parameters": ' in prompt
    assert 'assistant: [{"name": "weather", "arguments": {"city": "Rome"}}]\ntool: sunny\n' in prompt


def test_the_clients_own_system_message_stays_the_first() -> None:
    prompt = prompt_of(template_of(PLAIN), asked(system="Be brief."))
    assert prompt.startswith("system: Be brief.\n\nYou can call these functions:\n")
    assert prompt.count("system:") == 1


def test_tools_that_must_not_be_called_are_not_in_the_prompt() -> None:
    for text in (HERMES, PLAIN):
        assert "Of a city." not in prompt_of(template_of(text), asked(tool_choice="none"))
