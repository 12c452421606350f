"""The templates of pages: their environment, which escapes and cleans whatever is printed, and their one script."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from drkl.display import clean
from drkl.reporting import tables
from drkl.reporting.inputs import TITLES

if TYPE_CHECKING:
    from jinja2 import Environment

OWN = "drkl.reporting"
_MARKED = re.compile(
    r"(`[^`]*`"  # a command
    r"|\[[\d.,\s\N{MINUS SIGN}]+\]"  # an interval
    # A number that is a result: neither the 2 of "distinct-2" nor a count of steps.
    r"|(?<![\w.-])[+\N{MINUS SIGN}]?\d++(?:,\d{3})*+(?:\.\d+)?+(?:\N{NO-BREAK SPACE}%)?(?![\w-])(?! steps?\b))"
)


def page_environment(*packages: str) -> Environment:
    """The environment of a page's templates, which may use those of the report: head, style, macros and script.

    Args:
        packages: packages whose ``templates`` folders are looked into first.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, OWN)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a template prints passes here before it is escaped, so no text can reach the page unclean.
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    script = Markup(files(OWN).joinpath("templates", "page.js").read_text(encoding="utf-8"))
    environment.filters["numbers"] = emphasise
    environment.globals |= {
        "titles": TITLES,
        "compared": tables.COMPARED,
        "script": script,
        "script_hash": b64encode(sha256(script.encode()).digest()).decode(),
    }
    return environment


def emphasise(text: str) -> Markup:
    """Escape ``text``; set its numbers in ``<b>``, its intervals small, and its backquoted commands in ``<code>``."""
    parts = []
    for place, piece in enumerate(_MARKED.split(clean(text))):
        if place % 2 == 0:
            parts.append(escape(piece))
        elif piece.startswith("`"):
            parts.append(Markup("<code>{}</code>").format(piece[1:-1]))
        elif piece.startswith("["):
            parts.append(Markup('<span class="interval">{}</span>').format(piece))
        else:
            parts.append(Markup("<b>{}</b>").format(piece))
    return Markup("").join(parts)
