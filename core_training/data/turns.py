"""Texts and turns of conversations in the ways that files have them (plain, Alpaca, ShareGPT, TRL's).

Each function raises ValueError with what is wrong in a column.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from core_training.data.layout import Raw
from core_training.data.unknown import UNUSED_PARTS
from core_training.foundation.bounded_reading import parse_value
from core_training.parts.data_kinds.values import Message, Messages, Tools


def text_of(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {name} is empty or not a string")
    return value


def turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function": "tool",
}
"""ShareGPT's names of the roles that chat templates call otherwise."""

_CALLING = ("function_call", "tool_call")
"""ShareGPT's roles of an assistant's turn that calls a function."""

_KEPT = ("tool_calls", "reasoning_content", "name", "tool_call_id")


def _message(name: str, value: Any) -> Message:
    """`{role, content}` or ShareGPT's `{from, value}`, with what else says something in a turn."""
    if not isinstance(value, dict):
        raise ValueError(f"'{name}' must be a list of {{role, content}} or {{from, value}} with a text in each")
    role, content = (
        (value["role"], value.get("content")) if "role" in value else (value.get("from"), value.get("value"))
    )
    for part in UNUSED_PARTS:
        if value.get(part):
            raise ValueError(
                f"a turn in '{name}' has '{part}', which cannot be used; leave it out of the records, or set "
                "data.unknown: warn"
            )
    more = {part: value[part] for part in _KEPT if value.get(part)}
    if earlier := value.get("function_call"):  # OpenAI's before there were several
        more.setdefault("tool_calls", [earlier])
    if thinking := value.get("thinking"):
        more.setdefault("reasoning_content", thinking)
    if role in _CALLING and isinstance(content, str):
        role, content, more["tool_calls"] = "assistant", "", _calls(name, content)
    if "tool_calls" in more:
        more["tool_calls"], content = _checked_calls(name, more["tool_calls"]), content or ""
    if isinstance(content, list):
        content = _joined(name, content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"'{name}' must be a list of {{role, content}} or {{from, value}} with a text in each")
    if not all(isinstance(more.get(part, ""), str) for part in ("reasoning_content", "name", "tool_call_id")):
        raise ValueError(f"a turn in '{name}' has a reasoning_content, name or tool_call_id that is no text")
    message = {**turn(_ROLES.get(role, role), content), **more}
    if not _is_learnt(name, value):
        message["learnt"] = False
    return message


def _is_learnt(name: str, value: dict[str, Any]) -> bool:
    """Whether a turn is to be learnt: `weight` (OpenAI), `train` (axolotl) and `loss` say so; it is where none does."""
    said = [value[key] for key in ("weight", "train", "loss") if value.get(key) is not None]
    if any(isinstance(one, str) or one not in (0, 1) for one in said) or len(set(said)) > 1:
        raise ValueError(f"a turn in '{name}' has a weight, train or loss other than 0 and 1 (false and true)")
    return bool(said[0]) if said else True


def _joined(name: str, parts: list[Any]) -> str:
    """The text of a content that is a list of parts."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"a turn in '{name}' has a content with parts that are no texts; leave them out, or set data.unknown: warn"
        )
    return "".join(map(str, texts))


def _calls(name: str, text: str) -> list[Any]:
    """ShareGPT's calls: JSON of one `{name, arguments}` or a list of them."""
    try:
        calls = parse_value(text)
    except ValueError:
        raise ValueError(f"a function call in '{name}' is not JSON of {{name, arguments}}") from None
    return calls if isinstance(calls, list) else [calls]


def _checked_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """Calls as chat templates know them: `{type, function: {name, arguments}}`, the arguments as an object."""
    return [_checked_call(name, call) for call in (calls if isinstance(calls, list) else [calls])]


def _checked_call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = parse_value(arguments)
        if isinstance(arguments, dict):
            known = {key: call[key] for key in ("id",) if isinstance(call.get(key), str)}
            return {"type": "function", **known, "function": {"name": function["name"], "arguments": arguments}}
    raise ValueError(f"'{name}' has tool_calls that are no list of {{function: {{name, arguments}}}}")


def tools_of(value: Any) -> Tools:
    """Descriptions of functions: a list, or its JSON; bare ones (`{name, …}`) are put in the form of the others."""
    if isinstance(value, str):
        try:
            value = parse_value(value)
        except ValueError:
            raise ValueError("'tools' is a text that is not JSON") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("'tools' must be a list of descriptions of functions")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in tools):
        raise ValueError("'tools' must be a list of descriptions of functions, each with a name")
    return tools


def messages_of(name: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{name}' must be a list of {{role, content}} or {{from, value}}, not empty")
    messages = [_message(name, one) for one in value]
    if any(m["role"] == "assistant" and not m["content"].strip() and "tool_calls" not in m for m in messages):
        raise ValueError(f"an assistant's turn in '{name}' is empty")
    return messages


def conversation_of(name: str, value: Any) -> Messages:
    messages = messages_of(name, value)
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError(f"'{name}' must be a list of {{role, content}} with an assistant's turn among them")
    return messages


def prompt_of(name: str, value: Any) -> Messages:
    """A text as the user's turn, or the turns before the answer."""
    messages = messages_of(name, value) if isinstance(value, list) else [turn("user", text_of(name, value))]
    return checked_prompt(name, messages)


def checked_prompt(name: str, messages: Messages) -> Messages:
    if not messages or not messages[-1]["content"].strip():
        raise ValueError(f"the {name} is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"the {name} ends with an assistant's turn; it must end where the assistant is to speak")
    return messages


def answer_of(name: str, value: Any) -> Messages:
    """A text, one message, or a list of them: what the assistant says."""
    if isinstance(value, str):
        return [turn("assistant", text_of(name, value))]
    messages = messages_of(name, [value] if isinstance(value, dict) else value)
    if messages[0]["role"] != "assistant":
        raise ValueError(f"the {name} begins with another's turn; it must begin with the assistant's")
    return messages


def without_last_answer(messages: Messages) -> Messages:
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return messages


def alpaca_prompt(raw: Raw) -> Messages:
    """Alpaca's instruction and input, after a system text and earlier pairs of instruction and answer."""
    parts = [raw["instruction"], raw.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("the instruction or the input is not a string")
    messages, history = _system(raw), raw.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' must be a list of pairs: an instruction and its answer")
    for pair in history:
        messages += [
            turn("user", text_of("history's instruction", pair[0])),
            turn("assistant", text_of("history's answer", pair[1])),
        ]
    text = "\n".join(part for part in parts if part.strip())
    return [*messages, turn("user", text_of("instruction", text))]


def _system(raw: Raw) -> Messages:
    return [turn("system", text_of("system", raw["system"]))] if raw.get("system") else []


def with_system(raw: Raw, messages: Messages) -> Messages:
    """The record's system text, if it has one in a column of its own, before its turns."""
    system = _system(raw)
    if system and any(message["role"] == "system" for message in messages):
        raise ValueError("a system text stands in the column 'system' and among the turns; leave one of them out")
    return [*system, *messages]
