"""Model folders like those of models that call tools in Hermes' form, or think: SmolLM2, with another template."""

import shutil
from pathlib import Path

from tokenizers import AddedToken

from tests.processes import MODEL, ROOT

TEMPLATE = """\
{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- if tools %}
{%- set listed %}Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}{% endset %}
{{- turn("system", listed) }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}
{{- turn("user", "<tool_response>\\n" ~ message.content ~ "\\n</tool_response>") }}
{%- else %}
{%- set said %}{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{% endset %}
{{- turn(message.role, said) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


THINKING_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>
{%- endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if reasoning_effort is defined %}<|im_start|>system
{{ reasoning_effort }}<|im_end|>
{% endif %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_thinking_model(folder: Path, *, is_open: bool) -> Path:
    """One that has tokens for its thoughts. is_open: its prompt begins them."""
    from transformers import AutoTokenizer  # takes seconds

    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.chat_template = THINKING_TEMPLATE + "<think>\n" * is_open
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(ROOT / MODEL / name, folder)
    return folder


def make_hermes_model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copy(ROOT / MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
