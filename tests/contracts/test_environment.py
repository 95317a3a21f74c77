"""The libraries read the variables that core_training/foundation/environment.py sets, and read them as it means them.

Flower's are in test_flower.py, and what accelerate would read of training in test_accelerate.py.
"""

from __future__ import annotations

import logging

import core_training.foundation.environment as environment  # isort: skip - before the libraries are imported
import pytest

from tests.contracts.leaning import calls_out, leans, look_up

FILE = "core_training/foundation/environment.py"
READ = {
    "HF_HUB_OFFLINE": ("huggingface_hub.constants:HF_HUB_OFFLINE", True),
    "TRANSFORMERS_OFFLINE": ("huggingface_hub.constants:HF_HUB_OFFLINE", True),
    "HF_HUB_DISABLE_TELEMETRY": ("huggingface_hub.constants:HF_HUB_DISABLE_TELEMETRY", True),
    "DO_NOT_TRACK": ("huggingface_hub.constants:HF_HUB_DISABLE_TELEMETRY", True),
    "HF_DATASETS_OFFLINE": ("datasets.config:HF_HUB_OFFLINE", True),
    "FLWR_TELEMETRY_ENABLED": ("flwr.supercore.telemetry:FLWR_TELEMETRY_ENABLED", "0"),
    "USE_HUB_KERNELS": ("transformers.integrations.hub_kernels:_kernels_enabled", False),
}
"""What a library makes of a variable when it is imported."""

LOGGERS = {
    "flwr": "flwr.supercore.logger:FLOWER_LOGGER",
    "bitsandbytes.backends.cpu.ops": "bitsandbytes.backends.cpu.ops:logger",
    "torch.distributed.elastic.agent.server.api": "torch.distributed.elastic.agent.server.api:logger",
}
"""Loggers that are silenced by name."""


@leans(FILE)
@pytest.mark.parametrize("variable", READ)
def test_a_variable_means_to_its_library_what_it_is_set_for(variable: str) -> None:
    assert variable in environment.SETTINGS
    name, meant = READ[variable]
    assert look_up(FILE, name) == meant


@leans(FILE)
def test_nothing_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = calls_out(monkeypatch)
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("fedloom/there-is-none", "config.json")
    assert asked == []


@leans(FILE)
def test_warnings_for_developers_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    from transformers.utils import logging as transformers_logging

    logger = transformers_logging.get_logger("transformers.contract")
    logger.addHandler(caplog.handler)
    logger.warning_advice("advice")
    logger.removeHandler(caplog.handler)
    assert "advice" not in caplog.text


@leans(FILE)
@pytest.mark.parametrize("logger", LOGGERS)
def test_a_logger_goes_by_the_name_that_is_silenced(logger: str) -> None:
    found = look_up(FILE, LOGGERS[logger])
    assert isinstance(found, logging.Logger)
    assert found.name == logger
