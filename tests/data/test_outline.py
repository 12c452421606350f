"""A template that writes contents as they are is rendered once for all conversations of the same roles."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drkl.data.outline import writes_contents_alone
from drkl.data.rendering import Writer
from drkl.errors import DrklError
from tests.data.published_formats import FORMATS
from tests.data.test_published_formats import tokenizer
from tests.data.tiny_tokenizers import CHATML, LLAMA2, build

EACH = "{{% for m in messages %}}{}{{% endfor %}}"


@pytest.mark.parametrize(
    "name", ["CHATML", "LLAMA_3", "GEMMA_3", "PHI_3", "MISTRAL_3", "QWEN_25", "SMOLLM_2", "ZEPHYR"]
)
def test_formats_that_write_contents_as_they_are(name: str) -> None:
    assert writes_contents_alone(FORMATS[name].template)


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content[:2] }}",
        "{{ m.content | upper }}",
        "{{ m.content | length }}",
        "{{ m['content'].split('x')[0] }}",
        "{{ m.content * 2 }}",
        "{{ ('x' + m.content) | trim }}",
        "{{ m.content | trim('x') }}",
        "{{ m.content.strip('x') }}",
        "{{ m.content or 'x' }}",
        "{{ m | tojson }}",
        "{{ m.get('content') }}",
        "{{ m['con' + 'tent'] }}",
        "{{ m.values() | join }}",
        "{{ messages | tojson }}",
        "{{ messages | map(attribute='content') | join }}",
        "{{ loop.previtem.content }}",
        "{{ [m.content] | join }}",
        "{{ '%s' % m.content }}",
        "{{ namespace(x=m.content).x }}",
        "{% if m.content %}x{% endif %}",
        "{% if 'x' in m.content %}x{% endif %}",
        "{% if m.content == 'x' %}x{% endif %}",
        "{{ 'x' if m.content else 'y' }}",
        "{% if loop.changed(m.content) %}x{% endif %}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{% set c = m.content %}{% if c %}x{% endif %}",
        "{% set c = m.content %}{% set d = c %}{{ d | upper }}",
        "{% set c = ' ' + m.content %}{{ c | trim }}",
        "{% set n = namespace(c='') %}{% set n.c = m.content %}{{ n.c }}",
        "{% set c %}{{ m.content }}{% endset %}{{ c | upper }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% macro w(c) %}{{ c | upper }}{% endmacro %}{{ w(m.content) }}",
        "{% set o = m %}{{ o.content | upper }}",
        "{% set o = messages[0] %}{% if o.content %}x{% endif %}",
        "{% set l = messages[1:] %}{% if l[0].content %}x{% endif %}",
        "{% if not m.content is string %}x{% elif m.content %}y{% endif %}",
        "{{ raise_exception(m.content) }}",
        "{{ ['a', 'b'] | random }}",
        "{% if %}",
    ],
)
def test_templates_that_do_more_with_contents(written: str) -> None:
    assert not writes_contents_alone(EACH.format(written))


@pytest.mark.parametrize(
    "written",
    [
        "{{ '<' + m.role ~ '>' + m.content }}",
        "{{ m['content'] | trim }}|{{ m.content.strip() }}|{{ m.content }}",
        "{% set c = '[' + m.content + ']' %}{% if loop.first %}{% set c = bos_token + c %}{% endif %}{{ c }}",
        "{% if m.content is string and m.role != 'system' %}{{ m.content }}{% endif %}",
        "{{ m.role.title() }}{{ messages[0].content if loop.last }}{{ messages | length }}",
        "{% if loop.index0 is divisibleby 2 %}{% continue %}{% endif %}{{ m.content }}",
        "{{ messages[loop.index0 - 1]['content'] }}{{ add_generation_prompt }}",
    ],
)
def test_what_is_written_is_what_the_template_renders(written: str) -> None:
    template = EACH.format(written)
    assert writes_contents_alone(template)
    writer = Writer(build(template))
    for contents in (["a", "b", "c"], [" a\n", "\x1c", ""], ["drkl0content1x", "</s>", "{{ m }}"]):
        messages = [
            {"role": role, "content": text} for role, text in zip(("system", "user", "user"), contents, strict=True)
        ]
        for end in ([], messages[:1]):
            theirs = writer.tokenizer.apply_chat_template([*messages, *end], tokenize=False)
            assert writer.conversation([*messages, *end]) == theirs


@given(
    name=st.sampled_from(sorted(FORMATS)),
    contents=st.lists(st.text(" \n\x1cab<>|é", max_size=6), min_size=2, max_size=5),
    prompt=st.booleans(),
)
@settings(deadline=None, max_examples=10)
def test_published_formats_are_written_as_they_render(name: str, contents: list[str], prompt: bool) -> None:
    writer = Writer(tokenizer(name))
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]

    def text(write: Any) -> str:
        try:
            return write(messages, add_generation_prompt=prompt)
        except DrklError as error:
            return str(error)

    def rendered(messages: Any, add_generation_prompt: bool) -> str:
        return writer._rendered(messages, add_generation_prompt)

    assert text(writer.conversation) == text(rendered)


def test_a_template_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(build())
    calls: list[Any] = []
    rendered = Writer._rendered
    monkeypatch.setattr(Writer, "_rendered", lambda self, *given: calls.append(given) or rendered(self, *given))
    for text in ("a", "b", "c"):
        assert writer.prompt([{"role": "user", "content": text}]).endswith(f"{text}<|im_end|>\n<|im_start|>assistant\n")
    assert len(calls) == 1
    # More than a text, tools or another role are another conversation.
    writer.prompt([{"role": "user", "content": "a", "name": "x"}])
    writer.prompt([{"role": "system", "content": "a"}])
    assert len(calls) == 3
    assert Writer(build(), tools=[])._outlines is None


def test_refusals_are_the_templates_own() -> None:
    writer = Writer(build(LLAMA2))
    for _ in range(2):
        with pytest.raises(DrklError, match="refuses the roles system"):
            writer.conversation([{"role": "system", "content": "a"}])
    assert writes_contents_alone(CHATML)
