"""Fetching a base model from the hub, by a process of its own: the only one that may reach the hub.

All other processes have the hub switched off in their environment, and keep it so.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from core_training.foundation.environment import STAY_OFFLINE
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.hub_models import HubModel
from core_training.foundation.stopping import saying

_log = logging.getLogger(__name__)

_PROGRESS_OFF = "HF_HUB_DISABLE_PROGRESS_BARS"
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", _PROGRESS_OFF)


@dataclass(frozen=True)
class Fetched:
    """A model that was fetched: pinned to its commit, in the folder of its files."""

    model: HubModel
    folder: Path


def fetch(model: HubModel, *, quiet: bool = False) -> Fetched:
    """Fetch what a model needs to be trained into the hub's cache: safetensors, tokenizer, configuration, templates.

    Shows a progress bar where standard error is a terminal. Raises InputError for what the hub does not have or does
    not give, RunError for a download that broke off or came out damaged; what was fetched is kept, for the next time.
    """
    if os.environ.get(STAY_OFFLINE) == "1":
        raise InputError(
            f"{model} cannot be fetched: the environment says to stay offline (HF_HUB_OFFLINE, or {STAY_OFFLINE}); "
            "unset it, or bring the model's folder here"
        )
    if not quiet:
        _log.warning("fetching %s from the hub", model)
    progress = "0" if quiet or _PROGRESS_OFF in os.environ or not sys.stderr.isatty() else "1"
    how_to_go_on = "interrupted; what was fetched is kept, and the same command goes on from there"
    with saying(lambda: how_to_go_on):
        done = subprocess.run(
            [sys.executable, "-m", "core_training.foundation.hub_download", model.name, model.revision or "", progress],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=_environment(model),
            check=False,
        )
    return _answer(model, done)


def _environment(model: HubModel) -> dict[str, str]:
    """This process's own variables, and with them its token, with the hub switched on."""
    variables = {name: value for name, value in os.environ.items() if name not in _SWITCHES}
    variables["HF_HUB_CACHE"] = str(model.cache_folder.parent)
    variables["HF_HUB_VERBOSITY"] = "error"
    return variables


def _answer(model: HubModel, done: subprocess.CompletedProcess[bytes]) -> Fetched:
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise RunError(
            f"{model}: the process that fetched it ended without an answer (exit code {done.returncode}); run it again"
        ) from None
    if "error" in answer:
        raise (InputError if answer["is_input"] else RunError)(answer["error"])
    pinned = model.at(answer["commit"])
    if (folder := pinned.snapshot()) is None:
        raise RunError(f"{pinned}: the hub's cache lacks some of what was fetched; run it again")
    return Fetched(pinned, folder)
