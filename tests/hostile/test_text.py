"""Text from outside is bounded in size, depth, aliases and digits before it is looked at, and shown in few words."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from client.site_config import SITE_FILE, load_site_config
from client.worker_socket import _parse_header
from core_training.engine.engine import open_engine
from core_training.foundation.bounded_reading import (
    MOST_YAML_BYTES,
    ForeignTextError,
    parse_json,
    parse_yaml,
    shortened,
    shortened_text,
)
from core_training.foundation.errors import FedloomError, InputError, ProtocolError
from core_training.foundation.state import Manifest
from core_training.foundation.strict_json import strict_json
from core_training.recipe.llamafactory_data import read_entry
from core_training.recipe.reading import load_recipe, parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs.finished_run import find_result
from p2p.messages import GroupHeader, Hello, PeerMessage, StateRequest, UpdateHeader
from p2p.node_folder import P2P_FILE, read_node_config
from p2p.roster import read_member, read_roster
from server.federation import FEDERATION_FILE, open_federation
from strategies.messages import (
    Envelope,
    EvaluateOrder,
    EvaluateReply,
    JoinOrder,
    JoinReply,
    MaskedUpdate,
    Message,
    Refusal,
    SecureOrder,
    TrainOrder,
    Update,
)

MINIMAL = "model: {name_or_path: base}\nstage: sft\n"
LONGEST = 2500
"""Characters of an error, which may name a path."""


@contextmanager
def bounded(seconds: float = 5.0, memory: int = 500 * 2**20) -> Iterator[None]:
    """Fail where the block takes longer, in seconds of this process, or leaves the process that much larger."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - began < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < memory


def refused(read: Callable[[], object], *expected: type[Exception]) -> str:
    """The words in which something is refused, quickly and in few words."""
    with bounded(), pytest.raises(expected or (FedloomError,)) as caught:
        read()
    assert len(str(caught.value)) <= LONGEST
    assert str(caught.value).count("\n") < 10
    return str(caught.value)


def laughs(leaf: str, many: str) -> str:
    """Nine levels of aliases, nine to a level."""
    lines = [f"a0: &a0 {leaf}"]
    lines += [f"a{i}: &a{i} " + many.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 10)]
    return "\n".join(lines)


FULL = MOST_YAML_BYTES - 100
YAML: dict[str, str] = {
    "aliases of lists": laughs("[x, x]", "[{}]"),
    "aliases of mappings": laughs("{k: v}", "{{p: [{}]}}"),
    "merged mappings": laughs("{k: v}", "{{<<: [{}]}}"),
    "an alias of itself": "&a [*a]",
    "an alias of what it is in": "a: &a {b: {c: *a}}",
    "a ladder of aliases": "l:\n- &a0 [x]\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
    "lists in lists": "x: " + "[" * 100_000,
    "mappings in mappings": "{a: " * 100_000,
    "lists of dashes": "- " * (FULL // 2),
    "keys of keys": "? " * (FULL // 2),
    "many values": "x: [" + "a, " * (FULL // 3) + "]",
    "more than a mebibyte": "x" * (MOST_YAML_BYTES + 1),
    "more than a mebibyte, in bytes": "é" * (MOST_YAML_BYTES // 2 + 1),
    "4300 digits": "x: " + "9" * 4300,
    "4301 digits": "x: " + "9" * 4301,
    "a mebibyte of digits": "x: " + "9" * FULL,
    "hexadecimal digits": "x: 0x" + "f" * FULL,
    "binary digits": "x: 0b" + "1" * FULL,
    "octal digits": "x: 0" + "7" * FULL,
    "digits to the base of 60": "x: 1" + ":59" * (FULL // 3),
    "digits with a tag": "x: !!int '" + "9" * 5000 + "'",
    "code": "x: !!python/object/apply:os.system [touch /tmp/ran]",
    "a name of code": "x: !!python/name:os.system",
    "no such tag": "x: !" + "t" * 100_000,
    "a truth that is none": "x: !!bool maybe",
    "a day that is none": "x: !!timestamp 2001-99-99",
    "a number that is none": "x: !!int ''",
    "bytes that are none": "x: !!binary '%%%'",
    "a float that is none": "x: !!float wide",
    "a key twice": ("k" * 100_000 + ": 1\n") * 2,
    "a key that is a list": "? [a]\n: 1",
    "an anchor without an end": "&" + "a" * FULL,
    "an alias of nothing": "*" + "a" * FULL,
    "a directive without an end": "%" + "a" * FULL,
    "quotes without an end": '"' + "a" * FULL,
    "escapes that are none": '"\\q"',
    "control characters": "x: \x00\x01",
    "half of a pair": '"\\ud800',
    "tabs": "\t" * FULL,
    "several documents": "--- a\n" * 1000,
    "a mark in the middle": "a\ufeffb: [",
}


@pytest.mark.parametrize("name", YAML)
def test_no_yaml_takes_more_than_it_is(name: str) -> None:
    refused(lambda: parse_recipe(YAML[name], "recipe"), InputError)


@pytest.mark.parametrize("name", ["aliases of lists", "lists in lists", "4300 digits", "code", "half of a pair"])
def test_all_yaml_is_read_by_one_reader(tmp_path: Path, name: str) -> None:
    """A site's and a node's configuration, a server's, an override."""
    refused(lambda: parse_recipe(MINIMAL, overrides=[f"data.train={YAML[name]}"]), InputError)
    for file, read in {
        SITE_FILE: load_site_config,
        P2P_FILE: read_node_config,
        FEDERATION_FILE: open_federation,
    }.items():
        (tmp_path / file).write_text(YAML[name], encoding="utf-8", errors="surrogatepass")
        refused(lambda read=read: read(tmp_path), InputError)  # type: ignore[misc]


def test_a_key_that_yaml_takes_for_a_truth_value_is_its_text() -> None:
    assert parse_yaml("on: questions.jsonl\nno: {off: on}") == {"on": "questions.jsonl", "no": {"off": True}}


def test_no_key_of_yaml_is_a_number_that_collides_with_others() -> None:
    text = "\n".join(f"{number * (2**61 - 1)}: a" for number in range(1, 20_000))
    assert "quotes" in refused(lambda: parse_yaml(text), ForeignTextError)
    assert parse_yaml("a: &a {b: 1}\nc: {<<: *a, '1': 2}") == {"a": {"b": 1}, "c": {"b": 1, "1": 2}}


def test_what_people_write_with_aliases_is_read() -> None:
    text = (
        "defaults: &d {learning_rate: 1.0e-3}\nmodel: {name_or_path: base}\nother: {<<: *d, max_steps: 3}\nlist: [*d]"
    )
    read = parse_yaml(text)
    assert read["other"] == {"learning_rate": 1e-3, "max_steps": 3}
    assert read["list"] == [read["defaults"]]


HUGE = 10**5000
BAD_VALUES: dict[str, Any] = {
    "a long text": "x" * 100_000,
    "a list of texts": ["x" * 1000] * 100,
    "a deep list": [[[[["x"]]]]],
    "many keys": {f"k{i}": i for i in range(3000)},
    "a large number": int("9" * 39),
    "a number below zero": -(10**30),
    "control characters": "\x1b[2J\x1b]0;title\x07",
    "lines": "a\n" * 1000,
    "a path through folders": "../" * 1000,
    "a name that no disk takes": "a" * 300,
    "half of a pair": "\udcff",
    "an end of a text": "a\x00b",
    "braces": "{" * 1000 + "}" * 1000,
    "stars": "**/" * 50 + "*",
}


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("key", [*Recipe.model_fields, "no_such_key"])
def test_no_error_of_a_recipe_shows_a_value_whole(key: str, name: str) -> None:
    document = {"model": {"name_or_path": "base"}, "stage": "sft", key: BAD_VALUES[name]}
    if key == "output" and isinstance(BAD_VALUES[name], str):
        pytest.skip("any text is a folder's name")
    text = json.dumps(document)
    refused(lambda: parse_recipe(text, "recipe"), InputError)


TEXTS = {name: value for name, value in BAD_VALUES.items() if isinstance(value, str)}
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "the model": lambda text: {"model": {"name_or_path": text}},
    "an earlier run": lambda text: {"model": {"adapters": [text]}},
    "the chat template": lambda text: {"model": {"chat_template": text}},
    "training data": lambda text: {"data": {"train": text}},
    "held-out data": lambda text: {"data": {"eval": text}},
    "a reward model": lambda text: {"stage": "ppo", "rollout": {"reward_model": text}},
    "a reward function": lambda text: {"stage": "ppo", "rollout": {"reward_function": text}},
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("place", PLACES)
def test_no_name_in_a_recipe_is_a_traceback(make_recipe: Callable[..., Recipe], place: str, name: str) -> None:
    with suppress(InputError):
        recipe = make_recipe(**PLACES[place](TEXTS[name]))
        refused(lambda: open_engine(recipe), InputError)


JSON_TEXTS: dict[str, str] = {
    "nested lists": "[" * 200_000,
    "nested objects": '{"a":' * 200_000,
    "closed nested lists": "[" * 500 + "]" * 500,
    "4300 digits": '{"round": ' + "9" * 4300 + "}",
    "100000 digits": '{"round": ' + "9" * 100_000 + "}",
    "digits below zero": '{"round": -' + "9" * 4300 + "}",
    "not a number": '{"round": NaN}',
    "infinity": '{"round": Infinity}',
    "infinity below zero": '{"round": -Infinity}',
    "half of it": '{"round": ',
    "no quotes": "{round: 1}",
    "nothing": "",
    "a word": "null",
    "a list": "[]",
    "a number": "1",
    "an end of a text": '{"a": "\x00"}',
    "bytes of another encoding": "\ufffe{}",
}


@pytest.mark.parametrize("name", JSON_TEXTS)
def test_no_json_takes_more_than_it_is(tmp_path: Path, name: str) -> None:
    text, file = JSON_TEXTS[name], tmp_path / "file.json"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    if name not in ("a word", "a list", "a number"):
        refused(lambda: parse_json(text), ForeignTextError)
    refused(lambda: Envelope("train", text).fields, ProtocolError)
    refused(lambda: TrainOrder.open(Envelope("train", text)), ProtocolError)
    refused(lambda: _parse_header(text.encode("utf-8", "surrogatepass")), ProtocolError)
    refused(lambda: read_member(file), InputError)
    refused(lambda: read_roster(file, "ed25519:" + "A" * 43 + "="), InputError)
    (tmp_path / "dataset_info.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    refused(lambda: read_entry(tmp_path / "dataset_info.json:qa"), InputError)


DIGEST = "0" * 64
REPORT = {
    "steps": 1, "loss_first": 1.0, "loss_last": 1.0, "loss_mean": 1.0, "weight": 1, "tokens": 1, "seconds": 1.0
}  # fmt: skip
RIGHT: dict[type[Message], dict[str, Any]] = {
    JoinOrder: {"run_id": "r", "version": "1", "recipe": MINIMAL},
    JoinReply: {
        "run_id": "r", "version": "1", "recipe_digest": DIGEST, "manifest": [["w", [2]]], "initial_digest": DIGEST,
        "initial_state_digest": DIGEST, "roster_digest": None, "layout": {},
        "data": {"train_examples": 1, "eval_examples": 1, "truncated": 0, "dropped": 0},
    },
    TrainOrder: {"run_id": "r", "round": 1, "steps": 1, "evaluate": False, "manifest_digest": DIGEST},
    Update: {
        "run_id": "r", "round": 1, "manifest_digest": DIGEST, "weight": 1.0, "train": REPORT, "evaluation": None,
        "resident_seconds": 0.0, "seconds": 0.0,
    },
    MaskedUpdate: {
        "run_id": "r", "round": 1, "manifest_digest": DIGEST, "statement": "", "resident_seconds": 0.0,
        "training_seconds": 0.0, "masking_seconds": 0.0, "seconds": 0.0,
    },
    EvaluateOrder: {"run_id": "r", "round": 0, "final": True, "manifest_digest": DIGEST},
    EvaluateReply: {"run_id": "r", "round": 0, "evaluation": {"loss_sum": 1.0, "weight": 1, "examples": 1}},
    SecureOrder: {"run_id": "r", "step": "keys"},
    Refusal: {"reason": "no"},
}  # fmt: skip
BAD_FIELDS: dict[str, str] = {
    "a round of ten thousand million": "1" + "0" * 10,
    "4300 digits": "9" * 4300,
    "10000 digits": "9" * 10_000,
    "not a number": "NaN",
    "infinity": "Infinity",
    "the largest number": "1.7e308",
    "a number that is none": "1e999",
    "below zero": "-1",
    "a long text": json.dumps("x" * 1_200_000),
    "a list in lists": "[" * 150 + "]" * 150,
    "an object": '{"a": {"b": 1}}',
}


def opened(kind: type[Message], text: str) -> Message:
    """The message, with its manifest read, if it has one."""
    message = kind.open(Envelope(kind.kind, text))
    assert not isinstance(message, JoinReply) or message.parsed_manifest
    return message


def may_be(kind: type[Message], field: str, name: str) -> bool:
    """Whether a party may say so: what an update weighs is held against its site's records where it is added."""
    return (kind, field) == (Update, "weight") and name in ("a round of ten thousand million", "below zero")


@pytest.mark.parametrize("name", BAD_FIELDS)
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_no_field_of_a_message_takes_what_no_honest_party_sends(kind: type[Message], name: str) -> None:
    right = RIGHT[kind]
    opened(kind, json.dumps(right))
    for field in right:
        others = {key: value for key, value in right.items() if key != field}
        text = json.dumps(others)[:-1] + (", " if others else "") + f'"{field}": {BAD_FIELDS[name]}' + "}"
        if not may_be(kind, field, name):
            refused(lambda text=text: opened(kind, text), ProtocolError)  # type: ignore[misc]


@pytest.mark.parametrize("value", ["9" * 60, "NaN", "[" * 100 + "]" * 100])
def test_a_message_is_bounded_where_its_fields_are_anything(value: str) -> None:
    text = json.dumps(RIGHT[JoinReply]).replace("[2]", f"[{value}]")
    refused(lambda: JoinReply.open(Envelope(JoinReply.kind, text)), ProtocolError)


@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_no_name_of_a_field_is_shown_whole(kind: type[Message]) -> None:
    fields = {**RIGHT[kind], "k" * 1_000_000: 1}
    assert "\x1b" not in refused(lambda: kind.open(Envelope(kind.kind, json.dumps(fields))), ProtocolError)
    refused(lambda: kind.open(Envelope("x" * 1_000_000, "{}")), ProtocolError)
    fields = {**RIGHT[kind], "\x1b[2J": 1}
    assert "\x1b" not in refused(lambda: kind.open(Envelope(kind.kind, json.dumps(fields))), ProtocolError)


PEERS: list[type[PeerMessage]] = [Hello, UpdateHeader, GroupHeader, StateRequest]


STRANGE = [10**10, HUGE, -1, float("nan"), float("inf"), "x" * 10**6, ["x"] * 20_000, {}, None]


@pytest.mark.parametrize("value", STRANGE, ids=shortened)
@pytest.mark.parametrize("kind", PEERS)
def test_no_field_of_a_peers_message_takes_it_either(kind: type[PeerMessage], value: Any) -> None:
    for field in kind.model_fields:
        refused(lambda field=field: kind.read({field: value, "k" * 10**6: 1}), ProtocolError)  # type: ignore[misc]


@pytest.mark.parametrize(
    "manifest",
    [
        [["w", [10**4000]]],
        [["w", [2**41, 2**41]]],
        [["w", [1] * 10_000]],
        [["n" * 100_000, [1]]],
        [[f"{i:07}", [2**20]] for i in range(100_000)] * 11,
        [["w", [-1]]],
        [["w", [1.5]]],
        [["w", [True]]],
        [["w"]],
        [["b", [1]], ["a", [1]]],
        {"w": [1]},
    ],
    ids=shortened,
)
def test_no_manifest_is_of_more_than_any_model_has(manifest: Any) -> None:
    refused(lambda: Manifest.from_json(manifest), ProtocolError)


@pytest.mark.parametrize("steps", [10**6, 10**9])
def test_rounds_that_a_site_missed_are_passed_over_at_once(make_recipe: Callable[..., Recipe], steps: int) -> None:
    engine = open_engine(make_recipe())
    with bounded():
        engine.skip(steps)


def test_steps_that_are_passed_over_leave_the_schedule_where_steps_would(make_recipe: Callable[..., Recipe]) -> None:
    rates = []
    for parts in ([5], [2, 3], [0, 5], [1] * 5):
        engine = open_engine(make_recipe())
        for part in parts:
            engine.skip(part)
        rates.append(engine._current._inner_schedule.get_last_lr())
        assert engine._current._inner_schedule.last_epoch == 5
    assert all(rate == rates[0] for rate in rates)
    assert rates[0] != open_engine(make_recipe())._current._inner_schedule.get_last_lr()


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
@pytest.mark.parametrize("name", ["recipe.yaml", SITE_FILE, P2P_FILE, FEDERATION_FILE, "node.json"])
def test_no_configuration_is_a_pipe_or_without_an_end(tmp_path: Path, name: str, put: Callable[[Path], object]) -> None:
    put(tmp_path / name)
    readers: dict[str, Callable[[], object]] = {
        "recipe.yaml": lambda: load_recipe(tmp_path / name),
        SITE_FILE: lambda: load_site_config(tmp_path),
        P2P_FILE: lambda: read_node_config(tmp_path),
        FEDERATION_FILE: lambda: open_federation(tmp_path),
        "node.json": lambda: read_member(tmp_path / name),
    }
    assert "regular file" in refused(readers[name], InputError)
    refused(lambda: find_result(tmp_path), InputError)


def test_a_recipe_comes_through_a_shells_stream() -> None:
    read, write = os.pipe()
    os.write(write, MINIMAL.encode())
    os.close(write)
    assert load_recipe(f"/dev/fd/{read}").stage == "sft"
    os.close(read)


@pytest.mark.parametrize(
    "value",
    [HUGE, -HUGE, "x" * 10**7, [["x"] * 10**5] * 100, {"a": {"b": {"c": "d"}}}, b"x" * 10**6],
    ids=shortened,
)
def test_a_value_is_shown_in_few_words(value: Any) -> None:
    with bounded(1):
        assert len(shortened(value)) < 300


def test_what_is_short_is_shown_as_it_is() -> None:
    for value in ("fast", 3, -2.5, True, None, [1, "a"], {"a": 1}, float("inf")):
        assert shortened(value) == repr(value)
    assert shortened_text("a\x1b[2Jb\nc") == "a [2Jb c"
    assert shortened_text("a\u202eb\u2028c\u200bd") == "a b c d"
    assert str(InputError("a\u202eb\x1b[2J\nc")) == "a b [2J\nc"
    assert shortened_text("x" * 10_000, 10) == "x" * 9 + "…"


def test_json_that_goes_out_is_json() -> None:
    inf, nan = float("inf"), float("nan")
    text = strict_json({"loss": inf, "losses": [nan, -inf, 1.5], "more": {"x": (nan,)}, "text": "NaN"})
    expected = {"loss": None, "losses": [None, None, 1.5], "more": {"x": [None]}, "text": "NaN"}
    assert json.loads(text, parse_constant=pytest.fail) == expected
