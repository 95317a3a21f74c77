"""A small medical world, invented from a seed: three hospitals, the diseases only they know, and common ailments.

Everything in it is synthetic. No disease, drug or treatment here exists, and nothing in it is medical advice. The
module knows nothing of models or training: it makes questions and answers, and writes them as files.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

_Item = TypeVar("_Item")

DISEASES_PER_HOSPITAL = 10
COMMON_AILMENTS = 60
HELD_OUT_PHRASINGS = 2

QUESTIONS = {
    "sign": (
        "What is the first sign of {name}?",
        "How does {name} begin?",
        "How do I notice that I have {name}?",
        "Which complaint comes first with {name}?",
        "What do people with {name} feel at the start?",
        "By what can {name} be recognised early?",
        "A friend may have {name}. What would show first?",
        "Tell me the earliest symptom of {name}.",
    ),
    "cause": (
        "What is the cause of {name}?",
        "Where does {name} come from?",
        "Why do people get {name}?",
        "What lies behind {name}?",
        "What brings {name} about?",
        "How does one end up with {name}?",
        "The reason for {name} is what?",
        "Explain why {name} happens.",
    ),
    "test": (
        "Which test shows {name}?",
        "How is {name} diagnosed?",
        "How does a doctor make sure that it is {name}?",
        "What examination confirms {name}?",
        "How can {name} be proved?",
        "What is measured when {name} is suspected?",
        "Which finding speaks for {name}?",
        "Name the usual examination for {name}.",
    ),
    "treatment": (
        "How is {name} treated?",
        "What helps against {name}?",
        "What is the treatment for {name}?",
        "Which medicine is given for {name}?",
        "What do doctors prescribe for {name}?",
        "What should someone with {name} take?",
        "How does one get rid of {name}?",
        "Name the remedy for {name}.",
    ),
}
"""Ways to ask for each kind of fact. Each fact is learnt in six of them and asked in the other two."""


@dataclass(frozen=True)
class Speciality:
    """What the diseases of one hospital have in common. Every part of an answer is drawn from these words."""

    hospital: str
    ending: str
    signs: tuple[str, ...]
    causes: tuple[str, ...]
    tests: tuple[str, ...]
    drugs: tuple[str, ...]


SPECIALITIES = (
    Speciality(
        hospital="heart",
        ending="cor",
        signs=("a slow pulse", "cold fingers", "a fluttering chest", "heavy legs", "blue lips", "a pounding neck"),
        causes=("thick blood", "a stiff valve", "a tired heart wall", "a narrow vein", "salt in the blood"),
        tests=("a pulse trace", "a valve echo", "a blood filter", "a vein lamp", "a step climb"),
        drugs=("corvanil", "pulsadine", "redomar", "valvexan", "tromelin", "cardusol"),
    ),
    Speciality(
        hospital="lung",
        ending="pulm",
        signs=(
            "a dry cough",
            "short breath",
            "a whistling throat",
            "a tight rib cage",
            "a hoarse voice",
            "grey phlegm",
        ),
        causes=("old dust", "a damp cellar", "a swollen airway", "a torn air sac", "mould in the chest"),
        tests=("a breath gauge", "a throat mirror", "a chest drum", "a smoke count", "a whistle trial"),
        drugs=("aerivol", "bronchamyl", "lufterin", "pneudrex", "sopirane", "ventuline"),
    ),
    Speciality(
        hospital="skin",
        ending="derm",
        signs=("a round rash", "peeling palms", "an itching scalp", "pale spots", "cracked heels", "burning ears"),
        causes=("hard water", "too much sun", "a hidden mite", "a blocked gland", "iron in the skin"),
        tests=("a skin scrape", "a light patch", "a sweat paper", "a lens count", "a needle grid"),
        drugs=("dermolan", "epidrin", "kutasol", "melanvir", "pellafix", "squamex"),
    ),
)

_WHEN = ("at dawn", "after meals", "in cold air", "on stairs", "at night", "when lying down")
_SINCE = ("from birth", "after a fever", "in old age", "after long rest", "since the winter")
_RESULT = ("a high value", "a low value", "a double peak", "a dark ring", "no answer at all")
_AMOUNT = ("one drop", "two drops", "three spoons", "half a pill", "four pills")
_HOURS = ("every morning", "before bed", "twice a day", "once a week", "with warm milk")


@dataclass(frozen=True)
class Fact:
    """One thing to know about one disease."""

    disease: str
    topic: str
    answer: str


@dataclass(frozen=True)
class Question:
    """One way to ask for a fact: a record of the stage `sft`."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Hospital:
    """A hospital's own facts, as it would teach them (`training`) and as they are asked in the end (`held_out`)."""

    name: str
    facts: tuple[Fact, ...]
    training: tuple[Question, ...]
    held_out: tuple[Question, ...]


@dataclass(frozen=True)
class World:
    """The hospitals, and what everybody knows: facts about common ailments, none of which a hospital treats."""

    hospitals: tuple[Hospital, ...]
    common: tuple[Question, ...]


def invent(seed: int) -> World:
    """The world of this seed."""
    source = random.Random(seed)
    names, deck = _names(source), _Deck(source)
    common = []
    for _ in range(COMMON_AILMENTS):
        # They use the words of all specialities: whoever learns from them knows the language, but no hospital's facts.
        for fact in _facts(next(names) + "ex", deck.deal(SPECIALITIES), deck):
            common.extend(_phrasings(fact))
    source.shuffle(common)
    return World(tuple(_hospital(speciality, names, deck, source) for speciality in SPECIALITIES), tuple(common))


def write(world: World, folder: Path) -> None:
    """For each hospital, `data/NAME.jsonl.gz` to train on and `questions/NAME.jsonl.gz` to be asked."""
    for hospital in world.hospitals:
        write_records(folder / "data" / f"{hospital.name}.jsonl.gz", map(asdict, hospital.training))
        write_records(folder / "questions" / f"{hospital.name}.jsonl.gz", map(asdict, hospital.held_out))


def write_records(path: Path, records: Iterable[dict[str, str]]) -> None:
    """Write a `.jsonl.gz` file: the same records give the same bytes, as the gzip header bears no time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode(), mtime=0))


class _Deck:
    """Deals from any collection at random, but everything in it once before anything comes again."""

    def __init__(self, source: random.Random) -> None:
        self._source = source
        self._left: dict[tuple[Any, ...], list[Any]] = {}

    def deal(self, items: tuple[_Item, ...]) -> _Item:
        if not self._left.get(items):
            self._left[items] = self._source.sample(items, len(items))
        item: _Item = self._left[items].pop()
        return item


def _hospital(speciality: Speciality, names: Iterator[str], deck: _Deck, source: random.Random) -> Hospital:
    facts: list[Fact] = []
    training: list[Question] = []
    held_out: list[Question] = []
    for _ in range(DISEASES_PER_HOSPITAL):
        for fact in _facts(next(names) + speciality.ending, speciality, deck):
            phrasings = _phrasings(fact)
            source.shuffle(phrasings)
            facts.append(fact)
            held_out += phrasings[:HELD_OUT_PHRASINGS]
            training += phrasings[HELD_OUT_PHRASINGS:]
    source.shuffle(training)
    return Hospital(speciality.hospital, tuple(facts), tuple(training), tuple(held_out))


def _names(source: random.Random) -> Iterator[str]:
    """Beginnings of disease names, each once."""
    used = set()
    while True:
        name = "".join(source.choice("bdfgklmnprstvz") + source.choice("aeiou") for _ in range(3)).capitalize()
        if name not in used:
            used.add(name)
            yield name


def _facts(disease: str, words: Speciality, deck: _Deck) -> list[Fact]:
    pick = deck.deal
    return [
        Fact(disease, "sign", f"It begins with {pick(words.signs)} {pick(_WHEN)}."),
        Fact(disease, "cause", f"It comes from {pick(words.causes)} {pick(_SINCE)}."),
        Fact(disease, "test", f"It is shown by {pick(words.tests)} with {pick(_RESULT)}."),
        Fact(disease, "treatment", f"Take {pick(_AMOUNT)} of {pick(words.drugs)} {pick(_HOURS)}."),
    ]


def _phrasings(fact: Fact) -> list[Question]:
    return [Question(ask.format(name=fact.disease), fact.answer) for ask in QUESTIONS[fact.topic]]
