"""Base models by their names on the hub, from a stand-in for it: what is found, what is fetched, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from core_training.foundation.errors import InputError, RunError
from core_training.foundation.hub_fetch import fetch
from core_training.foundation.hub_models import HubModel, copy_model, find_model, hub_model
from core_training.foundation.model_files import weight_names, weights_digest
from tests.stand_in_hub import StandInHub

TINY = HubModel("org/tiny")
COMMIT = "c" * 40
NEEDED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
}


def cached(name: str, files: dict[str, str], commit: str = COMMIT) -> Path:
    """Put files into the cache as another program's download leaves them."""
    model = HubModel(name)
    folder = model.cache_folder / "snapshots" / commit
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    model.reference.parent.mkdir(parents=True, exist_ok=True)
    model.reference.write_text(commit)
    return folder


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("gpt2", HubModel("gpt2")),
        ("org/tiny", HubModel("org/tiny")),
        ("org/tiny@v1.0", HubModel("org/tiny", "v1.0")),
        ("org/tiny@refs/pr/3", HubModel("org/tiny", "refs/pr/3")),
        ("models/base/tiny", None),
        ("/srv/tiny", None),
        ("./tiny", None),
        ("~/tiny", None),
        ("org/ti--ny", None),
        ("org/tiny@../../elsewhere", None),
        ("org/" + "n" * 100, None),
        ("", None),
    ],
)
def test_a_name_on_the_hub_is_told_from_a_path(text: str, meant: HubModel | None) -> None:
    assert hub_model(text) == meant


def test_a_folder_of_that_name_comes_first(hub: StandInHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached("org/tiny", {"config.json": "{}", "model.safetensors": ""})
    assert find_model("org/tiny") == find_model(f"org/tiny@{COMMIT}") == folder
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert find_model("org/tiny") == Path("org/tiny")
    assert hub_model("org/tiny") is None


@pytest.mark.usefixtures("hub")
def test_what_another_program_fetched_in_part_is_not_a_model() -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    cached("org/tokenizer", {"config.json": "{}", "tokenizer.json": "{}"})
    folder = cached("org/half", {"model.safetensors.index.json": index, "model-00001-of-00002.safetensors": ""})
    cached("org/adapter", {"config.json": "{}", "adapter_model.safetensors": ""})
    assert find_model("org/tokenizer") is None
    assert find_model("org/adapter") is None
    (folder / "config.json").write_text("{}")
    assert find_model("org/half") is None
    (folder / "model-00002-of-00002.safetensors").touch()
    assert find_model("org/half") == folder


@pytest.mark.parametrize(
    "index", ["[", "{}", '{"weight_map": {"a": "../../x.safetensors"}}', '{"weight_map": {"a": "x.bin"}}']
)
def test_an_index_that_names_other_than_weights_beside_it_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"index\.json: "):
        weight_names(tmp_path)


def test_what_a_model_needs_is_fetched_and_nothing_else(hub: StandInHub, tiny_model: Path) -> None:
    others = {
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"code",
        "onnx/model.safetensors": b"",
        "README.md": b"",
    }
    commit = hub.add("org/tiny", tiny_model, **others)
    fetched = fetch(TINY)
    assert fetched.model == TINY.at(commit)
    assert fetched.folder == find_model("org/tiny") == find_model(f"org/tiny@{commit}")
    assert {path.name for path in fetched.folder.iterdir()} == NEEDED
    assert set(hub.fetched()) == NEEDED
    assert weights_digest(fetched.folder) == weights_digest(tiny_model)


def test_of_weights_in_parts_those_of_the_index_are_fetched(hub: StandInHub, tmp_path: Path) -> None:
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}).encode()
    weights = {**{part: part.encode() for part in parts}, "consolidated.safetensors": b"the same in one file"}
    (tmp_path / "empty").mkdir()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, **weights}
    hub.add("org/tiny", tmp_path / "empty", **files)
    folder = fetch(TINY).folder
    assert sorted(hub.fetched()) == ["config.json", *parts, "model.safetensors.index.json"]
    assert weight_names(folder) == parts
    hub.add(
        "org/tiny", tmp_path / "empty", "next", **{**files, parts[0]: b""} | {"model.safetensors.index.json": b"{}"}
    )
    with pytest.raises(InputError, match="cannot be read as an index"):
        fetch(HubModel("org/tiny", "next"))


@pytest.mark.parametrize(
    "sent", [lambda data: data[:-100], lambda data: b"\0" * len(data)], ids=["cut short", "other bytes"]
)
def test_a_file_that_is_not_what_the_hub_lists_is_refused_and_fetched_the_next_time(
    hub: StandInHub, tiny_model: Path, sent: object
) -> None:
    hub.add("org/tiny", tiny_model)
    hub.spoilt["model.safetensors"] = sent((tiny_model / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match="run it again"):
        fetch(TINY)
    assert find_model("org/tiny") is None
    hub.spoilt.clear()
    hub.asked.clear()
    folder = fetch(TINY).folder
    assert hub.fetched() == ["model.safetensors"]
    assert weights_digest(folder) == weights_digest(tiny_model)


def test_a_download_whose_process_is_killed_goes_on_the_next_time(hub: StandInHub, tiny_model: Path) -> None:
    hub.add("org/tiny", tiny_model)

    def kill() -> None:
        (child,) = psutil.Process().children()
        child.kill()

    hub.halfway["model.safetensors"] = kill
    with pytest.raises(RunError, match=r"ended without an answer .*run it again"):
        fetch(TINY)
    assert find_model("org/tiny") is None
    hub.halfway.clear()
    hub.asked.clear()
    assert weights_digest(fetch(TINY).folder) == weights_digest(tiny_model)
    assert hub.fetched() == ["model.safetensors"]


def test_a_branch_stands_for_a_commit_until_the_next_fetch(hub: StandInHub, tiny_model: Path) -> None:
    first = hub.add("org/tiny", tiny_model)
    assert fetch(TINY).model.revision == first
    second = hub.add("org/tiny", tiny_model, **{"config.json": (tiny_model / "config.json").read_bytes() + b"\n"})
    hub.asked.clear()
    assert find_model("org/tiny") == TINY.at(first).snapshot()
    assert hub.asked == []
    assert fetch(TINY).model.revision == second
    assert find_model(f"org/tiny@{first}") == TINY.at(first).snapshot()


def test_what_the_hub_does_not_give_is_told_with_its_reason(hub: StandInHub, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    hub.add("org/tiny", tiny_model)
    hub.add("org/pickled", tmp_path / "empty", **{"config.json": b"{}", "pytorch_model.bin": b""})
    hub.add("org/other", tmp_path / "empty", **{"model.safetensors": b""})
    for model, expected in [
        (HubModel("org/none"), "has no model of that name, or a private one"),
        (HubModel("org/tiny", "v9"), r"org/tiny@v9: .* not this revision of it"),
        (HubModel("org/pickled"), "no model.safetensors .it has pickled ones, which are never fetched"),
        (HubModel("org/other"), "no config.json"),
    ]:
        with pytest.raises(InputError, match=expected):
            fetch(model)
    hub.claimed_sizes["model.safetensors"] = 2**60
    with pytest.raises(InputError, match=r"1073741824\.0 GiB are to be fetched, and there is room for"):
        fetch(TINY)
    assert "model.safetensors" not in hub.fetched()
    hub.asked.clear()
    hub.claimed_sizes["tokenizer.json"] = 2**30
    with pytest.raises(InputError, match=r"lists tokenizer\.json with 1,073,741,824 bytes; .* at most 268,435,456"):
        fetch(HubModel("org/tiny", hub.add("org/tiny", tiny_model, "v2", **{"README.md": b"other"})))
    assert hub.fetched() == []


def test_a_hub_out_of_reach_is_a_failure_that_passes(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"org/tiny: the download from http://127\.0\.0\.1:9 broke off: .*run it again"):
        fetch(TINY)
    assert hub.asked == []


def test_who_had_switched_the_hub_off_is_heeded(hub: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLOOM_OFFLINE", "1")
    with pytest.raises(InputError, match=r"the environment says to stay offline \(HF_HUB_OFFLINE"):
        fetch(TINY)
    assert hub.asked == []


@pytest.mark.parametrize("place", ["variable", "login"])
def test_a_token_opens_a_gated_model_and_is_written_nowhere(
    hub: StandInHub,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    place: str,
) -> None:
    hub.add("org/tiny", tiny_model)
    hub.repositories["org/tiny"].token = "hf_secret"
    with pytest.raises(
        InputError, match=r"to those who accept its terms: do so on http.*/org/tiny, then `hf auth login`"
    ):
        fetch(TINY)
    login = tmp_path / "hf" / "token"
    login.parent.mkdir(exist_ok=True)
    if place == "variable":
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
    else:
        login.write_text("hf_secret")
    hub.asked.clear()
    fetch(TINY)
    assert {one.token for one in hub.asked} == {"hf_secret"}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != login]
    assert files
    assert not any(b"hf_secret" in path.read_bytes() for path in files)
    assert "hf_secret" not in "".join(capfd.readouterr())
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_copy_holds_the_models_files_and_no_others(hub: StandInHub, tmp_path: Path) -> None:
    files = {"config.json": "{}", "model.safetensors": "w", "tokenizer.json": "{}"}
    folder = cached("org/tiny", {**files, "pytorch_model.bin": "", "code.py": "", "onnx/model.safetensors": ""})
    copy_model(folder, tmp_path / "copy")
    assert {path.name: path.read_text() for path in (tmp_path / "copy").iterdir()} == files
