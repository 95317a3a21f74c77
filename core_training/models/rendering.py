"""Chat templates of others, rendered in a process of its own: for threads that no alarm can interrupt.

A template is code in a small language; what it computes may take for ever inside one operation. The process ends by an
alarm of its own, whatever it is at, and the next rendering starts another.
`python core_training/models/rendering.py` is that process; it imports nothing of the project.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, cast

_Spans = list[tuple[int, int]]

_OF_A_MESSAGE = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Python's own errors that an expression raises, and that are made of nothing but a message."""


@dataclass(frozen=True)
class Rendering:
    """What is to be rendered: a conversation with its tools, by a template that may use the names of tokens.

    `marks` asks for the spans that the template marks as the assistant's, too.
    """

    template: str
    conversation: list[dict[str, Any]]
    tools: list[Any] | None
    names: dict[str, Any]
    to_answer: bool = False
    marks: bool = False


class UnfinishedError(RuntimeError):
    """The process was ended by its limits."""


class Renderer:
    """One process that renders for all threads of this one, each in its turn; at most for `seconds`, in `memory` bytes.

    Memory counts from what the process takes before it renders.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._started_by = 0

    def render(self, wanted: Rendering, seconds: float, memory: int) -> tuple[str, _Spans]:
        """The text and the marked spans. Raises UnfinishedError, and what the template itself raises."""
        with self._turn:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(json.dumps([asdict(wanted), seconds, memory]) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer.endswith("\n"):
                self._end()
                took = f"{seconds:g} s" if process.returncode == -signal.SIGALRM else "it is given"
                raise UnfinishedError(f"it takes more than {took}")
        said = json.loads(answer)
        if "raised" in said:
            raise _error(said["raised"], said["message"], said["line"])
        return said["text"], [(start, end) for start, end in said["spans"]]

    def _running(self) -> subprocess.Popen[str]:
        # A forked process has the pipes of the one that it was forked from, and must not talk into them.
        if self._process is None or self._started_by != os.getpid():
            self._process = subprocess.Popen(
                [sys.executable, "-I", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            self._started_by = os.getpid()
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.kill()
        process.wait()


def _error(name: str, message: str, line: int | None) -> Exception:
    from jinja2 import TemplateError, TemplateSyntaxError, exceptions

    kind = getattr(exceptions, name, None) or getattr(builtins, name, None)
    if kind is None or not issubclass(kind, (TemplateError, *_OF_A_MESSAGE)):
        return RuntimeError(message)
    return cast(Exception, kind(message, line or 1) if issubclass(kind, TemplateSyntaxError) else kind(message))


def main() -> None:
    """Render what comes in, a line each, until nothing does. The alarm's own way of ending a process ends this one."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm" if os.path.exists("/proc/self/statm") else os.devnull, "rb") as file:
        pages = file.read().split()  # none where this is not Linux: there memory is not bounded
    for line in sys.stdin:
        wanted, seconds, memory = json.loads(line)
        if pages:
            most = int(pages[0]) * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            answer = _rendered(Rendering(**wanted), render_jinja_template)
        except Exception as error:
            answer = {"raised": type(error).__name__, "message": str(error), "line": getattr(error, "lineno", None)}
        document = json.dumps(answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(document + "\n")
        sys.stdout.flush()


def _rendered(wanted: Rendering, render: Any) -> dict[str, Any]:
    (text,), spans = render(
        conversations=[wanted.conversation],
        tools=wanted.tools,
        chat_template=wanted.template,
        return_assistant_tokens_mask=wanted.marks,
        add_generation_prompt=wanted.to_answer,
        **wanted.names,
    )
    return {"text": text, "spans": spans[0] if wanted.marks else []}


if __name__ == "__main__":
    main()
