"""What tests share: one tiny model for the session, data files, and recipes on them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import settings

from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from tests import tiny
from tests.stand_in_hub import StandInHub, stand_in_hub

# What needs an extra of fedloom's cannot even be imported without; `make test` installs them all.
collect_ignore = [] if find_spec("deepspeed") else ["core_training/distributed/test_group.py"]

# Whoever starts the tests under nohup has this ignored, and fedloom respects that; they ask what it does otherwise.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples in every run: what fails on one machine fails on the next.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with slow tests first, so that what is left at the end is short and keeps all workers busy."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was not run for want of an environment of its own, and which target runs it."""
    skipped = (report.longrepr for report in terminalreporter.stats.get("skipped", []))
    reasons = {told[2].removeprefix("Skipped: ") for told in skipped if isinstance(told, tuple)}
    for reason in sorted(reason for reason in reasons if reason.startswith("not run: ")):
        terminalreporter.write_line(reason)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """A model this small is faster on one thread; processes that tests start read the variable."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer model with random weights."""
    return tiny.make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def site_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three sites' questions, of unequal size."""
    folder = tmp_path_factory.mktemp("sites")
    return [tiny.write_jsonl(folder / f"site{i}.jsonl", tiny.questions(i, 12 + 7 * i)) for i in range(3)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A hub on loopback in the place of the real one, with an empty cache, and no token of the user's."""
    from huggingface_hub import constants

    with stand_in_hub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("FEDLOOM_OFFLINE", "0")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def make_recipe(tiny_model: Path, site_files: list[Path]) -> Callable[..., Recipe]:
    """A small SFT recipe; keyword arguments replace or extend its sections."""

    def make(**sections: Any) -> Recipe:
        document: dict[str, Any] = {
            "model": {"name_or_path": str(tiny_model)},
            "stage": "sft",
            "tuning": {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}},
            "data": {
                "train": [str(path) for path in site_files],
                "columns": {"prompt": "question", "completion": "answer"},
                "eval_fraction": 0.2,
            },
            "training": {
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 4,
                "max_length": 64,
                "max_steps": 6,
                "packing": False,
            },
        }
        for name, section in sections.items():
            document[name] = {**document.get(name, {}), **section} if isinstance(section, dict) else section
        return parse_recipe(yaml.safe_dump(document))

    return make
