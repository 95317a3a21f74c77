"""A model's chat template: the text of a conversation, and what the template takes.

Where TRL has a variant of a published template for training, records are read with that one: it prints each turn alike
wherever it stands, and marks what the assistant says. A clock in a template stands still on the recipe's day, so that
the same records are the same tokens on every day. Files that others read keep the model's own template.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from core_training.foundation.limits import TooMuchError, can_interrupt, within
from core_training.models.rendering import Renderer, Rendering, UnfinishedError
from core_training.parts.data_kinds.values import Messages, Tools

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters of a text: from the first to before the second."""

SIGN = "\ufdd0"
"""A noncharacter of Unicode, which no text has; it stands where the template puts a content."""

RENDERED_WITHIN = 10.0
"""Seconds; a conversation takes a template milliseconds."""
RENDERED_IN = 2**30
"""Bytes of memory."""

_CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{- message['content'] + '<|im_end|>\\n' }}"
    "{% endgeneration %}{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKER = re.compile(r"<\|[^|<>\s]+\|>|</?[a-z_]+>")
_CLOCK = re.compile(r"\bstrftime_now\b")
_DIRECTIVES = [f"%{flag}{letter}" for letter in "aAbBcCdDeFgGhHIjklmMnprRStTuUVwWxXyYzZ" for flag in ("", "-")]
_PERCENT = "\ufdd2"


def template_names() -> list[str]:
    """The names that `model.chat_template` takes: `chatml`, and those of TRL's templates."""
    return ["chatml", *sorted(name for name in _published() if not name.endswith("_training"))]


def named_template(name: str) -> str | None:
    """The template of that name; None where there is none."""
    if name == "chatml":
        return _CHATML
    return _published()[name].read_text(encoding="utf-8") if name in template_names() else None


def template_tokens(name: str | None) -> set[str]:
    """The markers, such as `<|im_start|>`, in the template of that name; none for any other name."""
    template = (named_template(name) if name else None) or ""
    return set(_MARKER.findall(template + training_template(template)))


def training_template(template: str) -> str:
    """TRL's variant for training of a published template; any other template as it is."""
    return _variants().get(template, template)


@lru_cache(maxsize=1)
def _published() -> dict[str, Path]:
    trl = find_spec("trl")  # found and not imported, which takes longer than reading all of its templates
    assert trl is not None
    assert trl.submodule_search_locations is not None
    folder = Path(trl.submodule_search_locations[0]) / "chat_templates"
    return {path.name.removesuffix(".jinja"): path for path in folder.iterdir() if path.name.endswith(".jinja")}


@lru_cache(maxsize=1)
def _variants() -> dict[str, str]:
    known = _published()
    own = {name: name.removesuffix("_training") for name in known if name.endswith("_training")}
    return {known[own[name]].read_text(encoding="utf-8"): known[name].read_text(encoding="utf-8") for name in own}


def standing_clock(template: str, day: date) -> str:
    """The template with that day (at midnight) for its clock, if it reads one."""
    if not _CLOCK.search(template):
        return template
    printed = [("%%", _PERCENT), *((code, day.strftime(code)) for code in _DIRECTIVES), (_PERCENT, "%")]
    filters = "".join(f" | replace({code!r}, {text!r})" for code, text in printed if code != text)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro +%}}{template}"


@lru_cache(maxsize=64)
def _source(template: str, day: date) -> str:
    return standing_clock(training_template(template), day)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer's chat template, for conversations with these tools."""

    tokenizer: PreTrainedTokenizerBase
    day: date
    tools: Tools | None = None
    found_out: dict[Any, Any] = field(default_factory=dict)
    """What templates were seen to do, by their text and the question: records of one form are many."""

    def with_tools(self, tools: Tools | None) -> ChatTemplate:
        return self if tools is self.tools else replace(self, tools=tools)

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a template for such conversations."""
        own = self.tokenizer.chat_template
        return bool(own) and not (isinstance(own, dict) and "default" not in own and not self.tools)

    @property
    def source(self) -> str:
        """The template that is rendered; some models have another one for conversations with tools."""
        own = self.tokenizer.get_chat_template(tools=cast(Any, list(self.tools) if self.tools else None))
        return _source(own, self.day)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all that turns conversations into texts; of nothing for a model without a template."""
        own = self.tokenizer.chat_template
        templates = list(own.values()) if isinstance(own, dict) else [own] if own else []
        rendered = [_source(template, self.day) for template in templates]
        return hashlib.sha256(json.dumps([templates, rendered]).encode()).hexdigest()

    def text(self, messages: Messages, *, to_answer: bool = False) -> str:
        """The conversation's text; with `to_answer` up to where the assistant is to speak."""
        return self._rendered(messages, in_parts=self._takes_parts, to_answer=to_answer)

    def _rendered(self, messages: Messages, *, in_parts: bool, to_answer: bool = False) -> str:
        conversation = [_plain(message, in_parts=in_parts) for message in messages]
        return rendered(self.tokenizer, self.source, conversation, tools=self.tools, to_answer=to_answer)

    def encoding(self, text: str) -> Encoding:
        """The tokens of a text, and the characters that each is of; for a fast tokenizer."""
        # A call sets the tokenizer up (its file may say to cut or to pad); the calls after it need not do it again.
        self._once("set up", lambda: self.tokenizer(""))
        return cast("Encoding", self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))

    def text_and_marks(self, messages: Messages) -> tuple[str, list[Span] | None]:
        """The conversation's text, and the spans that the template marks in it; None where it marks none at all."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not _MARKS.search(self.source):
            return self.text(messages), None
        conversation = [_plain(message, in_parts=self._takes_parts) for message in messages]
        tools, names = list(self.tools) if self.tools else None, dict(self.tokenizer.special_tokens_map)
        if not can_interrupt():
            return _elsewhere(Rendering(self.source, conversation, tools, names, marks=True))
        with within(RENDERED_WITHIN, RENDERED_IN):
            rendered: Any = render_jinja_template(
                conversations=[conversation],
                tools=cast(Any, tools),
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **cast(dict[str, Any], names),
            )
        (text,), (spans,) = rendered
        return text, [(start, end) for start, end in spans]

    @property
    def takes_system(self) -> bool:
        """Whether a conversation may begin with a system text."""
        return self._takes("system", "user", "assistant")

    @property
    def takes_repeats(self) -> bool:
        """Whether a speaker may have two turns in a row."""
        return self._takes("user", "user", "assistant", "assistant")

    @property
    def takes_thoughts(self) -> bool:
        """Whether a thought apart from an answer's words is printed."""
        return self._prints(SIGN, [{"role": "assistant", "content": "Answer", "reasoning_content": SIGN}])

    @property
    def wraps_results(self) -> bool:
        """Whether the template itself puts `<tool_response>` around what a function gave."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        calling: Messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        return self._prints("<tool_response>", [*calling, {"role": "tool", "content": SIGN}])

    @property
    def opening(self) -> str:
        """What the template itself says between a question's words and where the answer is to begin."""

        def look() -> str:
            try:
                return self.text([{"role": "user", "content": SIGN}], to_answer=True).rpartition(SIGN)[2]
            except Exception:  # it does not take this conversation, and may raise anything
                return ""

        return cast(str, self._once("opening", look))

    def _prints(self, text: str, turns: Messages) -> bool:
        """Whether a conversation of a question and these turns has a text."""

        def look() -> bool:
            try:
                return text in self.text([{"role": "user", "content": "Question"}, *turns])
            except Exception:  # it does not take this conversation, and may raise anything
                return False

        return self.exists and cast(bool, self._once(("prints", text), look))

    def passed_over(self, messages: Messages, *, to_answer: bool) -> tuple[int, ...]:
        """The numbers of the turns whose contents the template leaves out, in a conversation of this form."""
        form = tuple((message["role"], len(message.get("tool_calls") or ())) for message in messages)

        def look() -> tuple[int, ...]:
            signs, turns = signed([{"role": m["role"], "tool_calls": m.get("tool_calls")} for m in messages])
            try:
                frame = self.text(turns, to_answer=to_answer)
            except Exception:  # it takes no such conversation, or no such contents
                frame = "".join(signs)
            return tuple(number for number, sign in enumerate(signs) if sign not in frame)

        return cast(tuple[int, ...], self._once(("passed over", form, to_answer), look))

    @property
    def turn_end(self) -> int | None:
        """The token of its own with which the template closes the assistant's turn; None where it has none."""
        if not self.exists:
            return None

        def look() -> int | None:
            turns = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": SIGN}]
            try:
                _, found, closing = self.text(turns).rpartition(SIGN)
            except Exception:  # an expression in it does not take this conversation, and may raise anything
                return None
            first = self.tokenizer.encode(closing.lstrip(), add_special_tokens=False)[:1]
            return first[0] if found and first and first[0] in self.tokenizer.added_tokens_decoder else None

        return cast("int | None", self._once("turn end", look))

    @property
    def _takes_parts(self) -> bool:
        """Whether contents must be lists of parts, as in the templates of many models of images."""

        def look() -> bool:
            for in_parts in (False, True):
                try:
                    if SIGN in self._rendered([{"role": "user", "content": SIGN}], in_parts=in_parts):
                        return in_parts
                except Exception:  # it does not take this conversation, and may raise anything
                    continue
            return False

        return cast(bool, self._once("parts", look))

    def _takes(self, *roles: str) -> bool:
        """Whether turns of these roles are all printed; True for a template that cannot be tried out."""
        if not self.exists:
            return True

        def printed(*roles: str) -> bool:
            signs, turns = signed([{"role": role} for role in roles])
            try:
                text = self.text(turns)
            except Exception:  # what it says of turns that it does not take
                return False
            return all(sign in text for sign in signs)

        plain = ("user", "assistant")
        return cast(bool, self._once(roles, lambda: printed(*roles) or not printed(*plain)))

    def _once(self, question: Any, look: Callable[[], Any]) -> Any:
        key = (self.source, question)
        if key not in self.found_out:
            self.found_out[key] = look()
        return self.found_out[key]


def signed(messages: Messages) -> tuple[list[str], Messages]:
    """A sign for each message, and the messages with it in the place of the content."""
    signs = [f"{SIGN}{number}\ufdd1" for number in range(len(messages))]
    return signs, [{**message, "content": sign} for message, sign in zip(messages, signs, strict=True)]


def _plain(message: dict[str, Any], *, in_parts: bool) -> dict[str, Any]:
    """A turn as templates know it."""
    plain = {part: value for part, value in message.items() if part != "learnt" and value is not None}
    return {**plain, "content": [{"type": "text", "text": plain["content"]}]} if in_parts else plain


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    conversation: list[dict[str, Any]],
    *,
    tools: Tools | None = None,
    to_answer: bool = False,
) -> str:
    """A conversation's text by a template of somebody else's, in bounded time and memory, in whatever thread.

    Raises TooMuchError where these do not suffice, and whatever the template raises.
    """
    given = list(tools) if tools else None
    if not can_interrupt():
        return _elsewhere(
            Rendering(template, conversation, given, dict(tokenizer.special_tokens_map), to_answer=to_answer)
        )[0]
    with within(RENDERED_WITHIN, RENDERED_IN):
        text = tokenizer.apply_chat_template(
            conversation,
            tools=cast(Any, given),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=to_answer,
        )
    return cast(str, text)


_renderer = Renderer()


def _elsewhere(wanted: Rendering) -> tuple[str, list[Span]]:
    try:
        return _renderer.render(wanted, RENDERED_WITHIN, RENDERED_IN)
    except UnfinishedError as error:
        raise TooMuchError(str(error)) from None
