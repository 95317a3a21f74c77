"""What is asked in an evaluation: items with what is right, tasks of them, and what a model gave. No files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from core_training.data.records import Record
from core_training.parts.data_kinds.values import Messages, Tools


@dataclass(frozen=True)
class Criterion:
    """One line of a rubric: what an answer is to have (or, with negative points, not to have)."""

    text: str
    points: float


@dataclass(frozen=True)
class Item:
    """One question. Unset parts do not apply to it.

    `prompt` are the turns before the answer; `plain` is the text that a model continues where no chat template is used.
    `choices` are what is scored behind the prompt, `labels` what tables call them, `gold` the number of the right one.
    `references` are right answers in words. `record` is where it stood; `is_readable` says that a stage of training
    can read it, and `is_text` that it is plain text, of which every token counts. `bare` is what is asked alone,
    without choices and the words that frame it, where the prompt has such.
    """

    id: str
    record: Record
    site: str
    prompt: Messages = field(default_factory=list)
    tools: Tools | None = None
    plain: str = ""
    delimiter: str = " "
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    gold: int | None = None
    references: tuple[str, ...] = ()
    rubric: tuple[Criterion, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    is_readable: bool = False
    is_text: bool = False
    bare: str = ""

    @property
    def place(self) -> str:
        return self.record.place

    @property
    def question(self) -> str:
        """The words of the prompt, for people and for functions."""
        return self.plain or "\n\n".join(str(message["content"]) for message in self.prompt)

    @property
    def bare_question(self) -> str:
        """What is asked alone, as it may stand in other texts: no system's words, no choices."""
        spoken = [str(message["content"]) for message in self.prompt if message["role"] != "system"]
        return self.bare or "\n\n".join(spoken) or self.plain

    @property
    def expected(self) -> str | None:
        """What would be right, in words: the right choice's label, or the first reference."""
        if self.gold is not None:
            return self.labels[self.gold]
        return self.references[0] if self.references else None


@dataclass(frozen=True)
class Sampling:
    """How answers are written: at `temperature` 0 the likeliest token each time; `stop` are texts that end one."""

    max_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Items, and what is to be measured on them.

    `metrics` are names of `evaluation.figures.metrics`; `chat` says whether prompts go through the chat template (None:
    where the model has one). `notes` are what a person should know of how the file was read.
    """

    name: str
    items: Sequence[Item]
    metrics: tuple[str, ...]
    chat: bool | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scored:
    """What a model found of an item's choices: log-probability (nats) and tokens of each, in their order."""

    id: str
    logps: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Written:
    """One answer in words. `ended` is False where the most tokens cut it off; `values` were given by judges since."""

    id: str
    sample: int
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Measured:
    """The loss on an item: summed negative log-probability (nats) of `tokens` tokens, `correct` of them likeliest."""

    id: str
    loss_sum: float
    tokens: int
    correct: int


@dataclass(frozen=True)
class Judged:
    """A judge's word on each criterion of an item's rubric: met, not met, or None where it gave no verdict."""

    id: str
    sample: int
    met: tuple[bool | None, ...]


@dataclass
class Answers:
    """All that one model gave on one task; `left_out` counts, with the reason, the items that it gave nothing on."""

    scored: dict[str, Scored] = field(default_factory=dict)
    written: dict[tuple[str, int], Written] = field(default_factory=dict)
    measured: dict[str, Measured] = field(default_factory=dict)
    judged: dict[tuple[str, int], Judged] = field(default_factory=dict)
    values: dict[str, dict[tuple[str, int], float]] = field(default_factory=dict)
    """Numbers that reward models and functions gave to written answers, by the metric's name."""
    kept_under: set[str] = field(default_factory=set)
    """The digests under which these numbers are kept."""
    left_out: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
