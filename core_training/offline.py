"""Keeps the libraries from calling home: no hub, no telemetry, no update checks. Import before any of them."""

import logging
import os

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DS_BUILD_LOG_LEVEL": "ERROR",
}
os.environ.update(SETTINGS)

# These speak while they are imported, to people who build libraries rather than to those who train.
for _name in ("DeepSpeed", "bitsandbytes", "bitsandbytes.backends.cpu.ops", "torch.distributed", "accelerate"):
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.ERROR)
for _name in ("torch.distributed.elastic", "torch.distributed.launcher"):  # the command reports failures itself
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def silence_libraries() -> None:
    """Keep warnings meant for library developers off a person's terminal."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|torch)(\.|$)")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(transformers|trl|peft|accelerate|torch)(\.|$)")
