"""accelerate leaves a model and an optimizer as they are, shares its state between runs, and reads known variables."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin
from torch import nn

from tests.contracts.leaning import leans, look_up, names
from tests.contracts.tiny_models import llama, tokens

NAMES = {
    "core_training/engine/preparation.py": [
        "accelerate.utils:GradientAccumulationPlugin",
    ],
    "core_training/engine/step_loop.py": [
        "accelerate.utils:set_seed",
        "accelerate:Accelerator.sync_gradients",
        "accelerate.scheduler:AcceleratedScheduler",
    ],
    "core_training/models/prepared_model.py": ["accelerate:Accelerator.unwrap_model", "accelerate:Accelerator.reduce"],
}


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


@pytest.fixture(autouse=True)
def _state_of_its_own() -> Iterator[None]:
    """accelerate's state is one for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def alone(precision: str = "no") -> Any:
    """As core_training/engine/preparation.py makes one for a run of one process."""
    return Accelerator(
        cpu=True,
        mixed_precision=precision,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def own_forward(model: Any) -> Callable[..., Any]:
    """Give the model a forward of its own, as core_training/models/precision.py does."""

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    model.forward = MethodType(forward, model)
    set_there: Callable[..., Any] = vars(model)["forward"]
    return set_there


# --- what it prepares


@leans("core_training/engine/preparation.py", "core_training/models/prepared_model.py")
def test_a_model_is_prepared_and_unwrapped_as_the_very_one_with_its_own_forward() -> None:
    model = llama()
    forward = own_forward(model)
    parameters = list(model.parameters())
    accelerator = alone()
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert prepared is model
    assert accelerator.unwrap_model(prepared) is model
    assert vars(model)["forward"] is forward
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model(input_ids=tokens(1, 3)).logits.dtype == torch.float32


@leans("core_training/engine/preparation.py", "core_training/engine/step_loop.py", "core_training/engine/correction.py")
def test_a_prepared_optimizer_is_the_very_one_inside_and_steps_it_once_through_its_hooks() -> None:
    layer = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    accelerator = alone()
    _, prepared = accelerator.prepare(layer, optimizer)
    assert prepared.optimizer is optimizer
    assert not hasattr(optimizer, "optimizer")
    assert prepared.state_dict() == optimizer.state_dict()
    calls: list[None] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(None))
    before = layer.weight.detach().clone()
    accelerator.sync_gradients = True
    accelerator.backward(layer(torch.ones(1, 2)).sum())
    prepared.step()
    assert len(calls) == 1
    torch.testing.assert_close(layer.weight, before - 1)


@leans("core_training/engine/step_loop.py")
def test_whether_a_backward_is_the_last_of_a_step_is_what_was_said_last() -> None:
    accelerator = alone()
    for last in (False, True, False):
        accelerator.sync_gradients = last
        assert accelerator.gradient_state.sync_gradients is last, "what is said is no longer heard by accelerate"
    accelerator.sync_gradients = True


@leans("core_training/engine/step_loop.py")
def test_a_backward_scales_nothing() -> None:
    weight = torch.ones(3, requires_grad=True)
    accelerator = alone()
    for last in (False, True):
        accelerator.sync_gradients = last
        accelerator.backward((2 * weight).sum())
    assert torch.equal(weight.grad, torch.full((3,), 4.0))  # type: ignore[arg-type]


@leans("core_training/models/prepared_model.py")
def test_a_process_alone_is_number_0_of_1_and_gathers_itself() -> None:
    accelerator = alone()
    assert (accelerator.process_index, accelerator.num_processes, accelerator.is_main_process) == (0, 1, True)
    assert accelerator.device.type == "cpu"
    assert accelerator.gather(torch.tensor([5])).tolist() == [5]


# --- what is one for the process


@leans("core_training/engine/preparation.py")
def test_many_runs_have_an_accelerator_each_and_the_first_goes_on() -> None:
    first, second = alone(), alone()
    assert first is not second
    assert (first.device.type, first.gradient_accumulation_steps) == ("cpu", 1)


@leans("core_training/engine/deepspeed_config.py")
def test_training_arguments_make_it_forget_what_it_was_told_before(tmp_path: Path) -> None:
    """A group's next engine needs that; a process with other runs in it must not make any."""
    from transformers import TrainingArguments

    alone()
    with pytest.raises(ValueError, match="already been initialized"):
        alone("bf16")
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert alone("bf16").mixed_precision == "bf16"


# --- what it reads from the environment


@leans("core_training/engine/preparation.py")
def test_what_is_said_counts_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    accelerator = alone()
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert accelerator.gradient_accumulation_steps == 1


DROPPED = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FP8_", "SM_HP_")
LAUNCHERS = ("PMI_", "PMIX_", "OMPI_COMM_", "MV2_COMM_", "MPI_LOCAL")
KNOWN = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("XLA_USE_BF16", "XLA_DOWNCAST_BF16", "USE_TORCH_XLA"),  # dropped by name
    *("NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "OMP_NUM_THREADS"),  # the machine's own
    *("DEEPSPEED_USE_HPU", "PT_HPU_LAZY_MODE", "PYTORCH_ENABLE_MPS_FALLBACK", "PJRT_DEVICE", "TPU_NAME"),
    "FORK_LAUNCHED",
}
"""What does not say how to train, or is dropped by name."""

NOT_USED = ("test_utils", "commands", "tracking.py", "utils/launch.py")


def variables_read(file: Path) -> set[str]:
    """The environment variables that a module names where it reads one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(file.read_text(encoding="utf-8"))
    read: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func)
            if called.endswith(("_from_env", "getenv", "environ.get", "environ.setdefault", "environ.pop")):
                read.append(node.args[0])
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            read.append(node.slice)
        elif isinstance(node, ast.Compare) and any("environ" in ast.unparse(one) for one in node.comparators):
            read.append(node.left)
    whole = [one for name in read for one in (name.elts if isinstance(name, ast.List) else [name])]
    values = [one.value for one in whole if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return {value for value in values if re.fullmatch(r"[A-Z][A-Z0-9_]+", value)}


@leans("core_training/foundation/environment.py")
def test_every_variable_that_it_reads_is_dropped_or_known_to_say_nothing_of_training() -> None:
    root = Path(accelerate.__file__).parent
    read: set[str] = set()
    for file in root.rglob("*.py"):
        if not str(file.relative_to(root)).startswith(NOT_USED):
            read |= variables_read(file)
    assert "ACCELERATE_MIXED_PRECISION" in read
    assert "PMI_RANK" in read
    assert sorted(name for name in read - KNOWN if not name.startswith((*DROPPED, *LAUNCHERS))) == []
