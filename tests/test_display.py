"""Untrusted text in Markdown."""

from __future__ import annotations

import pytest

from drkl.display import markdown_name, markdown_text


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a/b", "`a/b`"),
        ("a`b", "`` a`b ``"),
        ("`a``b", "``` `a``b ```"),
        ("a|b\n# c", r"`a\|b # c`"),
        ("a\x1b[31m\u202e", "`a\N{SYMBOL FOR ESCAPE}[31m[U+202E]`"),
    ],
)
def test_a_name_is_code_on_one_line(name: str, written: str) -> None:
    assert markdown_name(name) == written


def test_a_text_has_no_markdown() -> None:
    assert markdown_text("![x](http://a)\n<b>`c`") == r"!\[x\](http://a) \<b\>\`c\`"
