"""A model folder like those of models with tools in Hermes' form: SmolLM2's tokenizer, and another chat template."""

import shutil
from pathlib import Path

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


def make_hermes_model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copy(ROOT / MODEL / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
