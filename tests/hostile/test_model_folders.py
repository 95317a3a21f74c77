"""What sites start from is what is loaded: no file beside a model changes the one without changing the other."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoConfig, OlmoForCausalLM

from core_training.foundation.errors import InputError
from core_training.models.base_model import BaseModel
from core_training.models.heads import with_score_head
from core_training.models.loaded_digest import model_digests, tensors_digest
from core_training.models.outline import Outline
from core_training.recipe.schema import Recipe

Start = Callable[[Path], str]
Change = Callable[[Path], None]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def start(make_recipe: Callable[..., Recipe]) -> Start:
    """What the sites of a run on the model in a folder compare."""
    return lambda folder: BaseModel(make_recipe(model={"name_or_path": str(folder)})).initial_digest


@pytest.fixture
def refusal(make_recipe: Callable[..., Recipe]) -> Start:
    """The words in which the model in a folder is refused, by all that read it."""

    def refused(folder: Path) -> str:
        recipe = make_recipe(model={"name_or_path": str(folder)})
        said = []
        for read in (BaseModel, Outline):
            with pytest.raises(InputError) as caught:
                read(recipe)
            said.append(str(caught.value))
        assert len(said[0]) < 1000
        assert "\n" not in said[0]
        return said[0]

    return refused


def edit(name: str, **values: Any) -> Change:
    """Set keys of a JSON file, which is made where there is none."""

    def change(folder: Path) -> None:
        path = folder / name
        document = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(document | values))

    return change


def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor * 1.5 for name, tensor in tensors.items()}


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def scale_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.001
    write_weights(folder / WEIGHTS, tensors)


def tokenise_otherwise(change: Callable[[dict[str, Any]], None]) -> Change:
    def changed(folder: Path) -> None:
        document = json.loads((folder / "tokenizer.json").read_text())
        change(document)
        (folder / "tokenizer.json").write_text(json.dumps(document))

    return changed


def merge_otherwise(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


DIFFERENCES: dict[str, Change] = {
    "the configuration's epsilon": edit("config.json", rms_norm_eps=0.1),
    "its rotation": edit("config.json", rope_parameters={"rope_theta": 5.0, "rope_type": "default"}),
    "its activation": edit("config.json", hidden_act="relu"),
    "its dropout": edit("config.json", attention_dropout=0.5),
    "its length": edit("config.json", max_position_embeddings=64),
    "a key that nobody knows": edit("config.json", backdoor=True),
    "where an answer ends": edit("generation_config.json", eos_token_id=[2, 7]),
    "how it is sampled": edit("generation_config.json", do_sample=True, temperature=0.1),
    "a weight": scale_a_tensor,
    "a normaliser": tokenise_otherwise(lambda d: d.update(normalizer={"type": "Lowercase"})),
    "the order of merges": tokenise_otherwise(merge_otherwise),
    "how a special token is found": tokenise_otherwise(lambda d: d["added_tokens"][0].update(lstrip=True)),
    "a word that is split before": tokenise_otherwise(lambda d: d.update(pre_tokenizer={"type": "Whitespace"})),
    "the special tokens": edit("tokenizer_config.json", bos_token="<|user|>"),
    "how text is put together": edit("tokenizer_config.json", clean_up_tokenization_spaces=True),
    "whether texts have special tokens": edit("tokenizer_config.json", split_special_tokens=True),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_another_model_is_another_start(folder: Path, start: Start, tiny_model: Path, name: str) -> None:
    DIFFERENCES[name](folder)
    assert start(folder) != start(tiny_model)


def test_a_buffer_is_part_of_the_start(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.register_buffer("bias", torch.zeros(3))
    before = model_digests(model)
    model.bias[1] = 1e-6
    assert {name for name, digest in model_digests(model).items() if digest != before[name]} == {"weights"}


def in_parts(folder: Path) -> None:
    """The same weights in two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in parts.items():
        write_weights(folder / part, {name: tensors[name] for name in own})
    (folder / WEIGHTS).unlink()
    weight_map = {name: part for part, own in parts.items() for name in own}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


ALIKE: dict[str, Change] = {
    "elsewhere": lambda _: None,
    "in parts": in_parts,
    "written by another version": edit("config.json", transformers_version="4.0.0", _name_or_path="x", dtype="float16"),
    "generation settings of another version": edit("generation_config.json", transformers_version="4.0.0"),
    "with other files beside": lambda folder: (folder / "notes.txt").write_text("ours") and None,
}


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_model_is_the_same_start(folder: Path, start: Start, tiny_model: Path, name: str) -> None:
    ALIKE[name](folder)
    assert start(folder) == start(tiny_model)


def test_a_digest_is_of_names_types_shapes_and_values() -> None:
    known = tensors_digest({"b": torch.ones(2, 3), "a": torch.zeros(1, dtype=torch.bfloat16)})
    assert known == tensors_digest({"a": torch.zeros(1, dtype=torch.bfloat16), "b": torch.ones(3, 2).T})
    others = [
        {"b": torch.ones(3, 2), "a": torch.zeros(1, dtype=torch.bfloat16)},
        {"b": torch.ones(2, 3), "a": torch.zeros(1, dtype=torch.float16)},
        {"b": torch.ones(2, 3), "c": torch.zeros(1, dtype=torch.bfloat16)},
        {"b": torch.ones(2, 3), "a": torch.ones(1, dtype=torch.bfloat16)},
    ]
    assert known not in {tensors_digest(other) for other in others}


def decoy(named: str) -> Change:
    """Other weights that the configuration or an index names, beside those that people look at."""

    def change(folder: Path) -> None:
        tensors = scaled(load_file(folder / WEIGHTS))
        if named.endswith(".bin"):
            torch.save(tensors, folder / named)
        else:
            write_weights(folder / Path(named).name, tensors)

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def index_of(file: str, name: str = INDEX) -> Change:
    """An index that says that all weights are in one file."""

    def change(folder: Path) -> None:
        names = load_file(folder / WEIGHTS).keys()
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)}))

    return change


def only(change: Change) -> Change:
    """The change, and the usual file of weights away."""
    return both(change, lambda folder: (folder / WEIGHTS).unlink())


def replaced(name: str, put: Callable[[Path], object]) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        put(folder / name)

    return change


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def sparse(size: int) -> Callable[[Path], object]:
    def put(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return put


OTHER_INDEX = "other.safetensors.index.json"
REFUSED: dict[str, tuple[Change, str]] = {
    "weights that the configuration names": (
        both(decoy("other.safetensors"), edit("config.json", transformers_weights="other.safetensors")),
        "transformers_weights",
    ),
    "an index that the configuration names": (
        both(
            decoy("other.safetensors"),
            index_of("other.safetensors", OTHER_INDEX),
            edit("config.json", transformers_weights=OTHER_INDEX),
        ),
        "transformers_weights",
    ),
    "a pickle by an index that the configuration names": (
        both(
            decoy("other.bin"),
            index_of("other.bin", OTHER_INDEX),
            edit("config.json", transformers_weights=OTHER_INDEX),
        ),
        "transformers_weights",
    ),
    "a pickle that the configuration names": (
        both(decoy("adapter_model.bin"), edit("config.json", transformers_weights="adapter_model.bin")),
        "transformers_weights",
    ),
    "weights that a part of the configuration names": (
        edit("config.json", text_config={"transformers_weights": "other.safetensors"}),
        "transformers_weights",
    ),
    "a part of a distributed checkpoint": (decoy("shard-00000-model-00001-of-00001.safetensors"), "shard-00000"),
    "an adapter": (edit("adapter_config.json", peft_type="LORA", base_model_name_or_path="/elsewhere"), "adapter"),
    "a pickle by the index": (only(both(decoy("other.bin"), index_of("other.bin"))), "no safetensors file beside it"),
    "a file above the folder": (only(index_of("../other.safetensors")), "no safetensors file beside it"),
    "a file in a folder": (only(index_of("in/other.safetensors")), "no safetensors file beside it"),
    "a file anywhere": (only(index_of("/tmp/other.safetensors")), "no safetensors file beside it"),
    "an index of lists": (only(replaced(INDEX, text('{"weight_map": []}'))), "cannot be read as an index"),
    "an index that is nested": (only(replaced(INDEX, text("[" * 100_000))), "nested too deeply"),
    "an index of what is not there": (only(index_of("absent.safetensors")), "No such file"),
    "an index beside whole weights": (index_of("other.bin"), "no safetensors file beside it"),
    "weights that are a pipe": (replaced(WEIGHTS, os.mkfifo), "no regular file"),
    "weights without an end": (replaced(WEIGHTS, zero), "no regular file"),
    "a configuration that is a pipe": (replaced("config.json", os.mkfifo), "no config.json"),
    "a tokenizer without an end": (replaced("tokenizer.json", zero), "no regular file"),
    "a tokenizer that is a pipe": (replaced("tokenizer_config.json", os.mkfifo), "no regular file"),
    "generation settings without an end": (replaced("generation_config.json", zero), "no regular file"),
    "a tokenizer of terabytes": (replaced("tokenizer.json", sparse(2**42)), "bytes"),
    "a configuration of gigabytes": (replaced("config.json", sparse(2**31)), "bytes"),
    "a configuration that is nested": (replaced("config.json", text('{"a":' * 100_000)), "nested too deeply"),
    "a configuration that is a list": (replaced("config.json", text("[]")), "no model's configuration"),
    "a number of 4300 digits": (replaced("config.json", text('{"n": ' + "9" * 4300 + "}")), "4300 digits"),
    "attention of the hub's": (edit("config.json", attn_implementation="someone/attention"), "attn_implementation"),
    "experts of the hub's": (edit("config.json", experts_implementation="someone/x:f"), "experts_implementation"),
    "a hundred million layers": (edit("config.json", num_hidden_layers=10**8), "num_hidden_layers"),
    "layers by another name": (edit("config.json", model_type="gpt2", n_layer=10**8), "n_layer"),
    "layers of a part": (edit("config.json", text_config={"num_hidden_layers": 10**8}), "num_hidden_layers"),
    "layers of a part in a list": (edit("config.json", parts=[{"depth": 1e300}]), "depth"),
    "a hundred million experts": (edit("config.json", num_local_experts=10**8), "num_local_experts"),
    "a vocabulary of a hundred million": (edit("config.json", vocab_size=10**8), "vocab_size"),
    "a width of a hundred million": (edit("config.json", intermediate_size=10**8), "intermediate_size"),
    "another tokenizer": (
        edit("tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"]),
        "fast_tokenizer_files",
    ),
    "no such kind": (edit("config.json", model_type="no_such_model"), "model.name_or_path"),
    "a width of text": (edit("config.json", hidden_size="wide"), "model.name_or_path"),
    "no heads": (edit("config.json", num_attention_heads=0), "model.name_or_path"),
    "a square of positions": (edit("config.json", model_type="gpt_neo", max_position_embeddings=200_000), "16,384"),
    "a table of positions": (edit("config.json", model_type="gptj", n_positions=10**7), "16,384"),
    "a square of a block": (edit("config.json", model_type="minimax", block_size=10**5), "1,024"),
    "a square in a part": (edit("config.json", text_config={"model_type": "gpt_bigcode", "n_ctx": 10**6}), "16,384"),
    "positions without an end": (edit("config.json", max_position_embeddings=10**9), "16,777,216"),
    "a list of code": (edit("config.json", model_type="no_such_model", auto_map=["x"]), "model.name_or_path"),
}


LENGTH = 8
WEIGHTS_OF: dict[str, bytes] = {
    "nothing": b"",
    "a few bytes": b"1234",
    "zeros": bytes(4096),
    "a pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    "an archive": b"PK\x03\x04" + bytes(100),
    "a header of exabytes": (2**62).to_bytes(LENGTH, "little") + b"{}",
    "a header past the end": (1000).to_bytes(LENGTH, "little") + b"{}",
    "a header of no JSON": (4).to_bytes(LENGTH, "little") + b"oops",
    "a header that is a list": (2).to_bytes(LENGTH, "little") + b"[]",
    "a header that is nested": (200_000).to_bytes(LENGTH, "little") + b"[" * 200_000,
    "no tensors": (2).to_bytes(LENGTH, "little") + b"{}",
}
TENSORS: dict[str, dict[str, Any]] = {
    "a shape below zero": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    "a shape of exabytes": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
    "a shape that wraps round": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]},
    "an unknown type": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]},
    "offsets past the end": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]},
    "offsets backwards": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    "offsets of text": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "another shape than the model's": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
}


def one_tensor(entry: dict[str, Any]) -> bytes:
    header = json.dumps({"model.norm.weight": entry}).encode()
    return len(header).to_bytes(LENGTH, "little") + header + bytes(4)


@pytest.mark.parametrize("name", [*WEIGHTS_OF, *TENSORS])
def test_weights_that_are_none_are_refused(make_recipe: Callable[..., Recipe], folder: Path, name: str) -> None:
    (folder / WEIGHTS).write_bytes(WEIGHTS_OF[name] if name in WEIGHTS_OF else one_tensor(TENSORS[name]))
    with pytest.raises(InputError, match=r"model\.name_or_path"):
        BaseModel(make_recipe(model={"name_or_path": str(folder)}))


def test_a_long_context_is_loaded(folder: Path, start: Start) -> None:
    """As long as the longest that there is; such models turn positions round and keep no table of them."""
    edit("config.json", max_position_embeddings=10_485_760)(folder)
    assert start(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_looks_at_is_not_loaded(folder: Path, refusal: Start, name: str) -> None:
    change, expected = REFUSED[name]
    change(folder)
    assert expected in refusal(folder)


CODE = """
from pathlib import Path
Path(__file__).with_name("it-ran").touch()
Path({marker!r}).touch()
"""


@pytest.fixture
def code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears if the model's code runs, whoever is asked and says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (folder / "modeling.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    return tmp_path / "ran"


AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


@pytest.mark.parametrize("read", [BaseModel, Outline])
@pytest.mark.parametrize("kind", ["no_such_model", "clip", "bert", "whisper", "llama"])
def test_no_code_of_a_model_runs_whoever_says_yes(
    make_recipe: Callable[..., Recipe], folder: Path, code: Path, kind: str, read: Callable[[Recipe], object]
) -> None:
    edit("config.json", model_type=kind, auto_map=dict.fromkeys(AUTO, "modeling.Anything"))(folder)
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Anything", "modeling.Anything"]})(folder)
    with suppress(InputError):
        read(make_recipe(model={"name_or_path": str(folder)}))
    assert not code.exists()


def test_no_code_runs_where_transformers_has_no_classifier(folder: Path, code: Path) -> None:
    """The score's place is then one of our own, and nobody is asked."""
    auto_map = dict.fromkeys(AUTO, "modeling.Anything")
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32}
    OlmoForCausalLM(OlmoConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, auto_map=auto_map)).save_pretrained(
        folder
    )
    edit("config.json", auto_map=auto_map)(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert hasattr(with_score_head(model, seed=0), "score")
    assert not code.exists()


def test_a_tokenizer_without_rust_is_part_of_the_start(folder: Path, start: Start, tmp_path: Path) -> None:
    """Its files are, and so is each of its words."""
    from core_training.models.loaded_digest import tokenizer_digest

    (tmp_path / "byt5").mkdir()
    edit("tokenizer_config.json", tokenizer_class="ByT5Tokenizer")(tmp_path / "byt5")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "byt5", config=OlmoConfig())
    before = tokenizer_digest(tokenizer)
    assert before == tokenizer_digest(tokenizer)
    tokenizer.add_tokens(["word"])
    assert tokenizer_digest(tokenizer) != before


def test_a_person_sees_which_part_differs(
    folder: Path, start: Start, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit("config.json", rms_norm_eps=0.1)(folder)
    with caplog.at_level("INFO"):
        start(folder), start(tiny_model)
    one, other = (record.message for record in caplog.records if "the run starts from" in record.message)
    parts = [dict(part.rsplit(" ", 1) for part in said.split("from ")[1].split(", ")) for said in (one, other)]
    assert {name for name in parts[0] if parts[0][name] != parts[1][name]} == {"configuration"}
