"""ChatTemplate: renders chats (lists of messages) to text, as a tokenizer's own template says, alike on any day.

A template may ask for today's date (`strftime_now`; Llama 3.2's does). Data would be other data each day then, and a
run that goes on after midnight would mix two. So every template is rendered as of one date. What gives other text each
time is refused: Jinja's `random` and `lipsum`, the seconds since 1970 (which depend on the time zone), and an object of
Python, such as a function that a template does not call, which is printed with its place in memory.

A template prints a message's content either as a string or as a list of parts, such as {"type": "text", "text": ...};
some do both, some take the first part only, also by role (Mistral Small 3.1's). Given another form it may print a
Python list, or nothing, without an error. Which ones it prints is tried once for each role, and each content is given
in a form that is printed (`_Renderer`).

A template is a program of whoever wrote the tokenizer. Jinja's sandbox, in which transformers compiles it, keeps it
from files and from Python, but not from loops without end: so time, memory and the text it gives are bounded.
"""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date as calendar_date
from datetime import datetime
from hashlib import sha256
from typing import Any, TypeVar

from megatron_lrc.config import ConfigError
from megatron_lrc.data.assistant_turns import ASSISTANT, MarkedText, find_turns, has_markers, writes_no_header
from megatron_lrc.data.limits import TakesTooMuch, call_within
from megatron_lrc.data.lines import LONGEST_LINE

#: The date of chats unless --chat-date gives one. Llama's templates write it where no date can be had.
DEFAULT_DATE = "2024-07-26"
#: What a template may take to be compiled, or to render one chat, for which it takes milliseconds: seconds, bytes.
_SECONDS, _MEMORY = 3.0, 1 << 28
_DEFAULT_NAME = "default"  # of the template that apply_chat_template takes, too

Result = TypeVar("Result")
Content = str | list[dict[str, Any]]  # a string, or parts {"type": "text", "text": ...}


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


# As Python prints objects: <function strftime_now at 0x7f2b3c0d5e10>.
_PLACE_IN_MEMORY = re.compile(r" at 0x[0-9a-f]{6,}>")
# With glibc's flags and widths; Python itself does not pass on %z and %Z without them.
_OF_TIME_ZONE = re.compile(r"(?<!%)(?:%%)*%(?:[-_0^#EO\d]*s|[-_0^#EO\d]+[zZ])")
# What a template is tried on. Some print only the first of several parts.
_FIRST, _SECOND = "first-of-megatron-lrc", "second-of-megatron-lrc"
_MARKS = {"string": [_FIRST], "part": [_FIRST], "parts": [_FIRST, _SECOND]}
_FORMS: dict[str, Content] = {
    "string": _FIRST,
    "part": [_text_part(_FIRST)],
    "parts": [_text_part(_FIRST), _text_part(_SECOND)],
}
_PRINTED_PART = re.compile(rf"""text\\*["']\s*:\s*\\*["']{_FIRST}""")
# The roles of a chat in which a message of the role stands where templates expect it.
_PLACES = {"system": ["system", "user"], "user": ["user"], "assistant": ["user", "assistant"]}


@dataclass(frozen=True)
class ChatTemplate:
    """Renders chats as one of a tokenizer's templates says.

    The tokenizer of the directory is loaded again where the first chat is met: workers without chats stay light.
    """

    path: str
    templates: dict[str, str]  # name -> Jinja source
    name: str = _DEFAULT_NAME
    date: str | None = None  # YYYY-MM-DD; None: DEFAULT_DATE, unless the template has a date of its own

    def with_options(self, *, name: str | None, date: str | None) -> "ChatTemplate":
        """The template of --chat-template-name, as of --chat-date; None: the default one. ConfigError for others."""
        if name is not None and name not in self.templates:
            raise ConfigError(
                f"--chat-template-name {name}: the tokenizer {self.path!r} has no such chat template. "
                f"Give one of {', '.join(sorted(self.templates))}."
            )
        if date is not None:
            try:
                date = calendar_date.fromisoformat(date).isoformat()
            except ValueError as error:
                raise ConfigError(f"--chat-date {date} is no date. Give one such as {DEFAULT_DATE}.") from error
        return replace(self, name=name or self.name, date=date)

    @property
    def template(self) -> str | None:
        """Its Jinja source; None if the tokenizer has several, of which none is named default and none was chosen."""
        return self.templates.get(self.name)

    @property
    def identity(self) -> dict[str, str | None]:
        """What a manifest says of it."""
        return {
            "chat_template": sha256(self.template.encode()).hexdigest() if self.template is not None else None,
            "chat_template_name": self.name if self.template is not None else None,
            "chat_date": self.date or DEFAULT_DATE,
        }

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        """The whole chat as text, special tokens spelled out. ConfigError if the template refuses it.

        messages: as `chats.read_chat` gives them.
        """
        return self._rendered(lambda renderer: renderer(messages))

    def mark(self, messages: list[dict[str, Any]]) -> MarkedText:
        """The same text, and which parts of it are the assistant's. ConfigError also where that cannot be found."""
        return self._rendered(lambda renderer: renderer.mark(messages))

    def _rendered(self, use: "Callable[[_Renderer], Result]") -> Result:
        if self.template is None:
            raise ConfigError(
                f"it is a chat, and the tokenizer has several chat templates ({', '.join(sorted(self.templates))}), "
                "none of them named default; choose one with --chat-template-name"
            )
        try:
            return use(_renderer(self.path, self.template, self.date))
        except ConfigError:
            raise
        except TakesTooMuch as error:
            raise ConfigError(
                f"the tokenizer's chat template takes {error} for it, perhaps in a loop without end; mend the "
                "template, or choose another one with --chat-template-name"
            ) from error
        except Exception as error:  # a template is a program: it may fail in any way, and raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"the tokenizer's chat template refuses it ({type(error).__name__}: {reason})") from error


def chat_template_of(path: str, tokenizer: Any) -> ChatTemplate | None:
    """The chat templates of a transformers tokenizer that was loaded from `path`; None if it has none."""
    found = tokenizer.chat_template
    if not found:
        return None
    return ChatTemplate(path, dict(found) if isinstance(found, dict) else {_DEFAULT_NAME: found})


class _Renderer:
    """Renders chats with one template, each content in a form that it prints."""

    def __init__(self, path: str, template: str, date: str | None):
        self._tokenizer = _load_once(path)
        self._refused: TakesTooMuch | None = None  # to be compiled, or tried
        self._source = self._compile(template, date or DEFAULT_DATE)
        # Llama's name for the date of a chat, and its format. A template that has a date of its own keeps it
        # unless one is asked for.
        self._variables = {"date_string": _clock(date)("%d %b %Y")} if date else {}
        self._forms: dict[str, set[str]] = {}  # by role
        self._has_markers = has_markers(template)

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        if self._refused:
            raise self._refused
        text = self._render(self._all_in_form(messages))
        self._refuse_places_in_memory(text, messages)
        return text

    def mark(self, messages: list[dict[str, Any]]) -> MarkedText:
        text, in_form = self(messages), self._all_in_form(messages)
        if self._has_markers:
            return MarkedText(text, self._marked_spans(in_form, text))
        ends, is_headerless = self._special_tokens, self._is_headerless
        return MarkedText(text, find_turns(in_form, text, self._render, end_tokens=ends, is_headerless=is_headerless))

    def _marked_spans(self, messages: list[dict[str, Any]], text: str) -> tuple[tuple[int, int], ...]:
        """What stands between the template's {% generation %} markers: [from, to) in characters of the text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self._tokenizer.special_tokens_map, **self._variables}
        rendered: Any = call_within(
            lambda: render_jinja_template(
                [messages], chat_template=self._source, return_assistant_tokens_mask=True, **variables
            ),
            seconds=_SECONDS,
            num_bytes=_MEMORY,
        )
        (marked,), (spans,) = rendered
        if marked != text:
            raise ValueError("it gives another text where its {% generation %} markers are followed")
        return tuple((start, end) for start, end in spans if end > start)

    @functools.cached_property
    def _special_tokens(self) -> list[str]:
        return [token.content for token in self._tokenizer.added_tokens_decoder.values()]

    @functools.cached_property
    def _is_headerless(self) -> bool:
        question = self._all_in_form([{"role": "user", "content": "a"}])
        answer = self._all_in_form([{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": _FIRST}])
        return writes_no_header(question, answer, _FIRST, self._render)

    def _all_in_form(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**message, "content": self._in_form(message["role"], message["content"])} for message in messages]

    def _compile(self, template: str, date: str) -> str:
        try:
            return call_within(lambda: _as_of(date, template), seconds=_SECONDS, num_bytes=_MEMORY)
        except TakesTooMuch as error:
            self._refused = error
            return ""

    def _render(self, messages: list[dict[str, Any]], with_prompt: bool = False) -> str:
        text: str = call_within(
            lambda: self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=with_prompt,
                **self._variables,
            ),
            seconds=_SECONDS,
            num_bytes=_MEMORY,
        )
        if len(text) > LONGEST_LINE:
            raise TakesTooMuch(f"{len(text)} characters, and {LONGEST_LINE} are allowed,")
        return text

    def _refuse_places_in_memory(self, text: str, messages: list[dict[str, Any]]) -> None:
        """A chat about Python may hold some itself."""
        for place in set(_PLACE_IN_MEMORY.findall(text)):
            if place not in self._source and place not in repr(messages):
                raise ValueError(
                    f"it prints an object of Python and its place in memory (...{place}), so that the same chat would "
                    "be another text each time"
                )

    def _in_form(self, role: str, content: Content) -> Content:
        """As it is if the template prints that; else parts joined, with nothing between, or a string as one part."""
        forms = self._forms_of(role)
        if isinstance(content, list):
            if "parts" in forms:
                return content
            content = "".join(part["text"] for part in content)
        return [_text_part(content)] if content and "string" not in forms and "part" in forms else content

    def _forms_of(self, role: str) -> set[str]:
        """Those of `_FORMS` that the template prints. Of roles that are not tried: a string, if of users."""
        if role not in self._forms:
            if role in _PLACES:
                self._forms[role] = set(self._printed_forms(role))
            else:
                of_users = self._forms_of("user")
                self._forms[role] = {"string"} if "string" in of_users else of_users
        return self._forms[role]

    def _printed_forms(self, role: str) -> Iterator[str]:
        for form, content in _FORMS.items():
            tried = {"role": role, "content": content}
            chat = [
                tried if other == role else {"role": other, "content": self._in_form(other, "a")}
                for other in _PLACES[role]
            ]
            text = self._try(chat)
            # Printed as Python or JSON a part would have its key before the text.
            if all(mark in text for mark in _MARKS[form]) and not _PRINTED_PART.search(text):
                yield form

    def _try(self, messages: list[dict[str, Any]]) -> str:
        """The text, or none where the template fails. TakesTooMuch for good."""
        try:
            return self._render(messages)
        except TakesTooMuch as error:
            self._refused = error
            raise
        except Exception:
            return ""


_renderer = functools.cache(_Renderer)


@functools.cache
def _load_once(path: str) -> Any:
    from megatron_lrc.data.directory_tokenizer import open_tokenizer

    return open_tokenizer(path)


def _as_of(date: str, template: str) -> str:
    """A source that transformers renders as of this date.

    transformers passes data to a template, but no functions. It keeps each compiled source, though, with globals and
    filters of its own: those are changed here, of a source that differs from the template by a comment, so that
    nobody else renders with them. (The comment has a line to itself, which Jinja removes with it.)
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    source = f"{{# as of {date} #}}\n{template}"
    compiled = _compile_jinja_template(source)
    if _compile_jinja_template(source) is not compiled:
        raise RuntimeError("this version of transformers compiles a template anew each time, so no date can be fixed")
    compiled.globals.update(strftime_now=_clock(date), lipsum=_refuse_chance)
    compiled.environment.filters["random"] = _refuse_chance
    return source


def _clock(date: str) -> Any:
    """What takes the place of strftime_now: the start of this day."""
    moment = datetime.fromisoformat(date)

    def strftime_now(format: str) -> str:
        if _OF_TIME_ZONE.search(format):
            raise ValueError(f"the time that it asks for ({format!r}) depends on the time zone of the machine")
        return moment.strftime(format)

    return strftime_now


def _refuse_chance(*values: Any) -> str:
    raise ValueError("it draws random numbers, so that the same chat would be another text each time")
