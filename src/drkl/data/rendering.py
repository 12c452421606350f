"""Write conversations as text: by the tokenizer's chat template, or by one of the templates of ``data.template``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from drkl.data.encoding import TextEncoder
from drkl.data.limits import bounded
from drkl.errors import DrklError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drkl.data.outline import Outlines

    Messages = Sequence[Mapping[str, Any]]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
MINILLM_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
FOLLOW_UP = "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
NAMES = ("auto", "chat", "alpaca", "minillm", "plain")
CHAT_NAMED = "chat:"
"""``chat:NAME`` is the chat template of that name, where a tokenizer has several."""
DATE = datetime(2024, 7, 26)
"""What chat templates write as today, so that a row is the same every day; the date that Llama 3's templates have."""


def check_template(template: str) -> None:
    """Raise DrklError unless a template is a name of ``NAMES``, ``chat:NAME`` or a jinja template.

    Raises:
        DrklError: an unknown name, or jinja that does not parse (with its line).
    """
    if template in NAMES or (template.startswith(CHAT_NAMED) and "{" not in template):
        return
    if "{{" not in template and "{%" not in template:
        raise DrklError(
            f"there is no template {template!r}; expected {', '.join(NAMES)}, chat:NAME (one of a tokenizer's several "
            f"chat templates), or jinja text with {{{{ prompt }}}} or messages in it.{did_you_mean(template, NAMES)}"
        )
    compile_jinja(template)


@dataclass(frozen=True)
class Writer:
    """Writes conversations as text.

    Args:
        tokenizer: whose chat template and special tokens are written.
        template: a name of ``NAMES``, ``chat:NAME``, or jinja text.
        context_start: the character at which the input of a single user message begins.
        tools: the tools that a chat template or jinja text is given, as json schemas.
        template_kwargs: what it is given besides, by name.
        shared: what encodes the texts of this writer and of others; by default one of its own does.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = "auto"
    context_start: int | None = None
    tools: Sequence[Any] | None = None
    template_kwargs: Mapping[str, Any] | None = None
    shared: TextEncoder | None = None

    @cached_property
    def encoder(self) -> TextEncoder:
        """What encodes the texts."""
        return self.shared or TextEncoder(self.tokenizer)

    @cached_property
    def kind(self) -> str:
        """``chat``, ``alpaca``, ``minillm``, ``plain`` or ``jinja``.

        Raises:
            DrklError: an unknown template, or chat without a chat template.
        """
        if self.template == "auto":
            return "chat" if self.tokenizer.chat_template else "alpaca"
        if self.template == "chat" or self.template.startswith(CHAT_NAMED):
            if self.tokenizer.chat_template:
                return "chat"
            raise DrklError(
                f"data.template is {self.template!r}, but the tokenizer has no chat template; use alpaca, minillm, "
                "plain or jinja text."
            )
        check_template(self.template)
        return self.template if self.template in NAMES else "jinja"

    def prompt(self, messages: Messages) -> str:
        """Return the text after which the model answers ``messages``.

        Raises:
            DrklError: the template refuses the conversation, or fails.
        """
        kind = self.kind
        if kind == "chat":
            return self.conversation(messages, add_generation_prompt=True)
        instruction, context = instruction_text(messages), ""
        if kind in ("minillm", "jinja") and self.context_start is not None and len(messages) == 1:
            context = instruction[self.context_start :]
            instruction = instruction[: self.context_start].removesuffix("\n\n")
        if kind == "jinja":
            words = {"prompt": instruction_text(messages), "instruction": instruction, "input": context}
            return self._jinja(messages, words)
        if kind == "plain":
            return instruction
        return (
            MINILLM_INPUT.format(instruction=instruction, input=context)
            if context
            else ALPACA.format(instruction=instruction)
        )

    def conversation(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return a conversation as the tokenizer's chat template writes it.

        Raises:
            DrklError: the template refuses the conversation, or fails.
        """
        if self._outlines is None:
            return self._rendered(messages, add_generation_prompt)
        return self._outlines.text(messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _outlines(self) -> Outlines | None:
        """What the template writes around contents, if no more of a conversation matters to it."""
        from transformers import PreTrainedTokenizerBase

        from drkl.data.outline import Outlines, writes_contents_alone

        renders = getattr(self.tokenizer.apply_chat_template, "__func__", None)
        if self.tools is not None or self.template_kwargs or renders is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        return Outlines(self._rendered) if writes_contents_alone(self._dated_template) else None

    def _rendered(self, messages: Messages, add_generation_prompt: bool) -> str:
        import jinja2

        template = self._dated_template

        def render() -> Any:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if self.tools is None else list(self.tools),
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(self.template_kwargs or {}),
            )

        try:
            text = bounded(("chat", template), "The tokenizer's chat template", _WAY_OUT.strip(), render)
        except DrklError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise DrklError(f"The tokenizer's chat template is not valid jinja: {_words(error)}.{_WAY_OUT}") from error
        except jinja2.TemplateError as error:
            raise DrklError(
                f"The tokenizer's chat template refuses the roles {_roles(messages)}: {_words(error)}. Change such "
                "rows, or set data.template to alpaca, plain or jinja text."
            ) from error
        # A template is somebody's code: it may fail in any way.
        except Exception as error:
            raise DrklError(
                f"The tokenizer's chat template failed on the roles {_roles(messages)}: {type(error).__name__}: "
                f"{_words(error)}.{_WAY_OUT}"
            ) from error
        if len(text) > _LARGEST + 10 * sum(len(str(message)) for message in messages):
            raise DrklError(
                f"The tokenizer's chat template makes {len(text):,} characters of one conversation. It is broken, or "
                f"made to stop this program.{_WAY_OUT}"
            )
        return str(text)

    @cached_property
    def _dated_template(self) -> str:
        return _with_fixed_date(self.chat_template)

    @property
    def chat_template(self) -> str:
        """The chat template's text; of several the one that is named, or that the tokenizer itself would take.

        Raises:
            DrklError: there is none of that name.
        """
        templates = self.tokenizer.chat_template
        if isinstance(templates, str):
            if self.template.startswith(CHAT_NAMED):
                raise DrklError(
                    f"data.template is {self.template!r}, but the tokenizer has one chat template: use chat."
                )
            return templates
        name = self.template.removeprefix(CHAT_NAMED)
        if name == self.template:
            name = "tool_use" if self.tools is not None and "tool_use" in templates else "default"
        if name not in templates:
            names = ", ".join(f"{CHAT_NAMED}{name}" for name in templates)
            raise DrklError(
                f"The tokenizer has {len(templates)} chat templates and none is named {name!r}. Set data.template to "
                f"one of {names}."
            )
        return str(templates[name])

    def _jinja(self, messages: Messages, words: Mapping[str, str]) -> str:
        compiled = compile_jinja(self.template)
        tokens = {"bos_token": self.tokenizer.bos_token or "", "eos_token": self.tokenizer.eos_token or ""}
        given = {**(self.template_kwargs or {}), **words, **tokens, "tools": self.tools}

        def render() -> Any:
            return compiled.render(messages=[dict(message) for message in messages], **given)

        try:
            text = bounded(("jinja", self.template), "data.template", _ONLY_PROMPTS.strip(), render)
        except DrklError:
            raise
        # A template is the user's code: it may fail in any way.
        except Exception as error:
            raise DrklError(
                f"data.template failed: {type(error).__name__}: {_words(error)}. It is given messages, prompt, "
                f"instruction, input, tools, bos_token and eos_token.{_ONLY_PROMPTS}"
            ) from error
        return str(text)


def _words(error: Exception) -> str:
    """What a template, or jinja, says of its failing, on one line."""
    return " ".join(str(error).split())[:_LONGEST].rstrip(".")


def _roles(messages: Messages) -> str:
    return ", ".join(str(message.get("role")) for message in messages)


def _with_fixed_date(template: str) -> str:
    """A chat template in which ``strftime_now`` writes `DATE`: arguments of a template cannot be functions."""
    if CLOCK not in template:
        return template
    words = {code: DATE.strftime(code) for code in map("%{}".format, _CODES)} | _WORDS
    codes = "".join(f"|replace('{code}', '{word}')" for code, word in words.items())
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{codes} }}}}{{% endmacro %}}\n{template}"


def date_told(tokenizer: PreTrainedTokenizerBase, template: str = "auto") -> str | None:
    """Return `DATE` in words where a chat template asks for today's date, else None.

    Raises:
        DrklError: as `Writer.kind`.
    """
    templates = tokenizer.chat_template if Writer(tokenizer, template).kind == "chat" else None
    text = "".join(templates.values()) if isinstance(templates, Mapping) else templates or ""
    return f"{DATE:%d %B %Y}" if CLOCK in text else None


CLOCK = "strftime_now"
"""The function by which a chat template asks for the date."""
_CODES = "aAbBcdfGHIjmMpSuUVwWxXyYzZ"
# Those that not every system knows.
_WORDS = {"%-d": "26", "%-m": "7", "%e": "26", "%D": "07/26/24", "%F": "2024-07-26", "%T": "00:00:00"}
_LARGEST = 1 << 22
"""Characters that a template may write, beside ten times those of the messages: no model reads so much."""
_LONGEST = 300
"""Characters of an error's own words."""
_ONLY_PROMPTS = " It writes the prompt alone; a chat template belongs in the tokenizer, as its chat_template."
_WAY_OUT = " Give the tokenizer another chat_template, or set data.template to alpaca, plain or jinja text."


def instruction_text(messages: Messages) -> str:
    """Return a single message's text; else all turns, after ``User:`` or ``Assistant:`` (a system message bare)."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    names = {"user": "User: ", "assistant": "Assistant: "}
    return "\n\n".join(names.get(m["role"], "") + (m.get("content") or "") for m in messages)


@lru_cache(maxsize=8)
def compile_jinja(template: str) -> Any:
    """Return jinja text of ``data.template``, compiled; it runs in a sandbox.

    Raises:
        DrklError: it does not parse.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    try:
        # What it can compute without a conversation, it computes here.
        return bounded(
            ("compile", template), "data.template", _ONLY_PROMPTS.strip(), lambda: environment.from_string(template)
        )
    except DrklError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise DrklError(
            f"data.template is not valid jinja (line {error.lineno}): {str(error.message).rstrip('.')}.{_ONLY_PROMPTS}"
        ) from error
    except Exception as error:  # thousands of brackets, or of loops in one another
        raise DrklError(
            f"data.template cannot be compiled: {type(error).__name__}: {_words(error)}.{_ONLY_PROMPTS}"
        ) from error


_NOT_WRITTEN = ("role", "id", "name", "tool_call_id")
"""Fields of a message that say whose it is; templates write it by their own words."""
BESIDE_CALLS = "the content beside tool_calls"
_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of one thing, each of which transformers copies to another."""


def unused_fields(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template: str = "auto",
    *,
    tools: Sequence[Any] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    known: set[Sign] | None = None,
) -> list[str]:
    """Return the names of what a conversation has and the template does not write.

    Looked at are ``tools``, ``template_kwargs`` by name, each message's fields besides its content (but for its id and
    name), every call's name and arguments, and the text of messages that are neither the user's nor the assistant's,
    named by their role. A field is written where its reply is the last one: templates leave out the reasoning of
    earlier turns on purpose. ``known`` is what the template was seen to write in other conversations, so that it is not
    looked for again; what is found is added.

    Raises:
        DrklError: the template refuses the conversation, or fails.
    """
    writer = Writer(tokenizer, template, None, tools, template_kwargs)
    is_chat = writer.kind == "chat"
    source = writer.chat_template if is_chat else template if writer.kind == "jinja" else ""
    unused = [name for name in template_kwargs or () if not re.search(rf"\b{re.escape(name)}\b", source)]
    known = set() if known is None else known
    if tools and ("tools",) not in known and not _differs(writer, replace(writer, tools=None), messages, messages):
        unused.insert(0, "tools")
    for index, message in enumerate(messages):
        end = _reply_after(messages, index) if is_chat else len(messages)
        for sign, changed in _without_each(message):
            if sign in known or sign[0] in unused:
                continue
            if _differs(writer, writer, messages[:end], [*messages[:index], changed, *messages[index + 1 : end]]):
                known.add(sign)
            else:
                unused.append(sign[0])
    if tools and "tools" not in unused:
        known.add(("tools",))
    return unused


def _reply_after(messages: Messages, index: int) -> int:
    """The number of messages up to the next reply, that of ``index`` itself included."""
    replies = (i + 1 for i in range(index, len(messages)) if messages[i]["role"] == "assistant")
    return next(replies, len(messages))


def _without_each(message: Mapping[str, Any]) -> Iterator[tuple[Sign, dict[str, Any]]]:
    """A message without each of its fields, or with another one in its place; each with the field's sign."""
    place = (str(message["role"]), bool(message.get("content")), bool(message.get("tool_calls")))
    for name, value in message.items():
        if name in _NOT_WRITTEN or value in (None, "", [], {}):
            continue
        if name == "content":
            if message["role"] not in ("user", "assistant"):
                yield place[:1], {**message, name: _PROBE}
            elif message["role"] == "assistant" and message.get("tool_calls"):
                yield (BESIDE_CALLS, *place), {**message, name: _PROBE}
        elif name in _REASONING:
            yield (name, *place), {k: v for k, v in message.items() if k not in _REASONING or v != value}
        else:
            yield (name, *place), {k: v for k, v in message.items() if k != name}
    calls: list[Any] = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        function = call.get("function", {})
        others = [{**function, "name": _PROBE}]
        if arguments := function.get("arguments"):
            probe = {_PROBE: _PROBE}
            others.append({**function, "arguments": json.dumps(probe) if isinstance(arguments, str) else probe})
        for what, other in enumerate(others):
            changed = [*calls[:number], {**call, "function": other}, *calls[number + 1 :]]
            sign = ("tool_calls", *place, len(calls), number, what, type(arguments).__name__)
            yield sign, {**message, "tool_calls": changed}


_PROBE = "drkl0field0probe"
Sign = tuple[Any, ...]
"""What a field is, and where: its name (or a role) first. A template writes all fields of one sign, or none."""


def _differs(writer: Writer, other: Writer, messages: Messages, changed: Messages) -> bool:
    """Whether two conversations are written differently; outside chat the last message is its content alone."""

    def written(writer: Writer, messages: Messages) -> str:
        return writer.conversation(messages) if writer.kind == "chat" else writer.prompt(messages[:-1])

    whole = written(writer, messages)
    try:
        return whole != written(other, changed)
    except DrklError:
        return True  # it needs what was taken away
