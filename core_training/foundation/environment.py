"""The settings that the libraries read from the environment, before any of them is imported.

No hub, no telemetry, no update checks; nothing that would train otherwise than the recipe says; threads that do not
starve other processes. What decides over the machine (devices, numbers of threads, instruction sets, where caches lie)
stays the user's.
"""

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
    "USE_HUB_KERNELS": "0",
    "DS_BUILD_LOG_LEVEL": "ERROR",
    "GRPC_VERBOSITY": "NONE",  # a line for each handshake that a stranger breaks off fills a disk
}

GIVES_MEMORY_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""What has glibc give large pieces of memory back when they are freed, for processes that messages pass through: else
each keeps what it once held. Where a process computes, it would cost time (docs/decisions/029)."""

STAY_OFFLINE = "FEDLOOM_OFFLINE"
"""The variable that says whether the user wants nothing fetched at all: "1" where the hub was switched off before.

Every process of fedloom's has the hub switched off, so that in a later one those variables no longer tell.
"""

_OTHERS_RECIPES = (
    "ACCELERATE_",  # `accelerate config` and `accelerate launch`: precision, DeepSpeed, FSDP, compilation, …
    "FSDP_",
    "PARALLELISM_CONFIG_",
    "MEGATRON_LM_",
    "FP8_",
    "SM_HP_",  # SageMaker's hyperparameters
)
"""Beginnings of variables that say how to train. A recipe says that, and one digest means one recipe."""

_OTHER_ARITHMETIC = (
    "XLA_USE_BF16",
    "XLA_DOWNCAST_BF16",
    "USE_TORCH_XLA",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "TRANSFORMERS_SDPA_FORCE_GQA",
    "PYTORCH_TUNABLEOP_ENABLED",
    "DS_ACCELERATOR",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD",  # with it DeepSpeed cannot read its own checkpoints
)
"""Variables that make the same operations come out otherwise, or not at all."""

_DOORS = ("FLWR_INTERNAL_GRPC_", "RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_DEBUG")
"""Beginnings of variables that open further interfaces beside those that are guarded, or lead to those of others."""

_LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "FEDLOOM_GROUP_FOLDER",  # fedloom's own
)
_LAUNCHERS_OF_MPI = ("PMI_", "PMIX_", "OMPI_COMM_", "MV2_COMM_", "MPI_LOCAL")

_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def _drop(names: list[str]) -> list[str]:
    for name in names:
        del os.environ[name]
    return names


IGNORED = _drop(sorted(n for n in os.environ if n.startswith((*_OTHERS_RECIPES, *_DOORS)) or n in _OTHER_ARITHMETIC))
"""The variables that were set and are not heeded."""

_was_switched_off = any(
    os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
)
os.environ.setdefault(STAY_OFFLINE, "1" if _was_switched_off else "0")
os.environ.update(SETTINGS)

# OpenMP's threads wait for each other by spinning: three processes on two cores then mostly wait. Alone, spinning this
# much shorter costs 2 %; it is read when torch is imported.
if not any(name in os.environ for name in _WAITING):
    os.environ["GOMP_SPINCOUNT"] = "1000"


def train_alone() -> None:
    """Forget what a launcher set, in a process that trains without others: the libraries would wait for them."""
    _drop([name for name in os.environ if name in _LAUNCHERS or name.startswith(_LAUNCHERS_OF_MPI)])


# These speak while they are imported, to people who build libraries rather than to those who train.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it sets its own level
for _name in ("bitsandbytes", "torch.distributed", "accelerate"):
    logging.getLogger(_name).setLevel(logging.ERROR)
for _name in ("torch.distributed.elastic", "torch.distributed.launcher"):  # the command reports failures itself
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def silence_libraries() -> None:
    """Keep warnings meant for library developers off a person's terminal."""
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|torch)(\.|$)")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(transformers|trl|peft|accelerate|torch)(\.|$)")
