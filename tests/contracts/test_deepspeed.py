"""DeepSpeed, and accelerate and transformers under it, step when told, keep master copies, and lay parameters out.

An engine of each kind is made in one process of its own, `python -m tests.contracts.test_deepspeed FILE`, which is a
group of one; the tests read what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import core_training.foundation.environment  # noqa: F401  # isort: skip - before the libraries are imported
import pytest

from tests.contracts.leaning import leans, look_up, names

pytest.importorskip("deepspeed")
ROOT = Path(__file__).parents[2]

NAMES = {
    "core_training/models/parameters.py": [
        "deepspeed.utils:safe_get_full_fp32_param",
        "deepspeed.utils:safe_get_local_fp32_param",
        "deepspeed.utils:safe_set_full_fp32_param",
        "deepspeed.utils:safe_set_local_fp32_param",
        "deepspeed:zero.GatheredParameters",
        "deepspeed:DeepSpeedEngine.empty_partition_cache",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3.refresh_fp32_params",
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.refresh_fp32_params",
        "deepspeed.runtime.bf16_optimizer:BF16_Optimizer.refresh_fp32_params",
    ],
    "core_training/engine/step_loop.py": [
        "deepspeed:DeepSpeedEngine.get_global_grad_norm",
        "deepspeed:DeepSpeedEngine.save_checkpoint",
        "deepspeed:DeepSpeedEngine.load_checkpoint",
    ],
    "core_training/engine/preparation.py": [
        "deepspeed:DeepSpeedEngine",
        "accelerate.utils:DummyOptim",
        "accelerate.utils:DummyScheduler",
    ],
    "core_training/engine/deepspeed_config.py": [
        "transformers.integrations.deepspeed:HfTrainerDeepSpeedConfig.trainer_config_finalize"
    ],
    "core_training/distributed/group.py": [
        "deepspeed:init_distributed",
        "transformers.integrations.deepspeed:unset_hf_deepspeed_config",
    ],
}


@pytest.mark.parametrize(("file", "name"), names(NAMES), ids=str)
def test_a_name_is_where_it_was(file: str, name: str) -> None:
    look_up(file, name)


@leans("core_training/foundation/environment.py")
def test_deepspeed_speaks_under_the_name_that_is_silenced() -> None:
    assert look_up("core_training/foundation/environment.py", "deepspeed.utils:logger").name == "DeepSpeed"


# --- what the process does, on a frozen and a trained matrix


def _plugin(stage: int, bfloat16: bool, model: Any, clip: float = 0.0) -> Any:
    """What core_training/engine/deepspeed_config.py asks transformers for; two batches make a step."""
    from transformers import TrainingArguments

    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= dict.fromkeys(
            ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
        )
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        deepspeed={
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": bfloat16},
            "steps_per_print": 1_000_000_000,
        },
        use_cpu=True,
        bf16=bfloat16,
        learning_rate=1.0,
        max_grad_norm=clip,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to="none",
    )
    arguments.hf_deepspeed_config.trainer_config_finalize(arguments, model, 10)
    return arguments.deepspeed_plugin


def _model(bfloat16: bool) -> Any:
    import torch

    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False), torch.nn.Linear(5, 3, bias=False))
    model.config = type("Config", (), {"hidden_size": 6})()
    model[1].requires_grad_(False)
    return model.bfloat16() if bfloat16 else model


def _prepared(stage: int, bfloat16: bool, optimizer: Callable[[Any], Any], clip: float = 0.0) -> tuple[Any, ...]:
    """As core_training/engine/preparation.py prepares a model for a group."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    model = _model(bfloat16)
    plugin = _plugin(stage, bfloat16, model, clip)
    accelerator = Accelerator(
        deepspeed_plugin=plugin,
        mixed_precision="bf16" if bfloat16 else "no",
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    made = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad])
    engine, wrapped = accelerator.prepare(model, made)
    return plugin, accelerator, model, engine, wrapped, made


def _batches(bfloat16: bool) -> list[Any]:
    import torch

    batches = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    return list(batches.bfloat16() if bfloat16 else batches)


def _step(accelerator: Any, engine: Any, bfloat16: bool) -> None:
    for number, batch in enumerate(_batches(bfloat16)):
        accelerator.sync_gradients = number == 1
        accelerator.backward(engine(batch).float().square().sum(), scale_wrt_gas=False)


def _value(parameter: Any) -> Any:
    from deepspeed import zero

    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float().clone()
    with zero.GatheredParameters([parameter], modifier_rank=0):
        return parameter.detach().float().clone()


def _look_at(stage: int, bfloat16: bool) -> dict[str, Any]:
    """One step with a learning rate of 1: what moved, when, by how much, and how it was laid out."""
    import torch
    from deepspeed import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_fp32_param

    plugin, accelerator, model, engine, wrapped, made = _prepared(stage, bfloat16, lambda p: torch.optim.SGD(p, lr=1.0))
    weight, frozen = model[0].weight, model[1].weight
    reference = _model(bfloat16)
    losses = sum(reference(batch).float().square().sum() for batch in _batches(bfloat16))
    losses.backward()
    gradient = reference[0].weight.grad.float()
    start = _value(weight)
    first, second = _batches(bfloat16)
    accelerator.sync_gradients = False
    accelerator.backward(engine(first).float().square().sum(), scale_wrt_gas=False)
    between = _value(weight)
    accelerator.sync_gradients = True
    accelerator.backward(engine(second).float().square().sum(), scale_wrt_gas=False)
    after = _value(weight)
    inner = wrapped
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    norm = engine.get_global_grad_norm()
    master = safe_get_full_fp32_param(weight)
    return {
        "engine": type(engine) is DeepSpeedEngine,
        "unwrapped": accelerator.unwrap_model(engine) is model,
        "optimizer": inner is made,
        "auto": "auto" in json.dumps(plugin.deepspeed_config),
        "config": {
            "clipping": engine.gradient_clipping(),
            "untested": engine.zero_allow_untested_optimizer(),
            "bfloat16": engine.bfloat16_enabled(),
            "stage": int(engine.zero_optimization_stage()),
        },
        "partitioned": [hasattr(weight, "ds_id"), hasattr(weight, "ds_shape"), hasattr(frozen, "ds_id")],
        "shape": list(getattr(weight, "ds_shape", weight.shape)),
        "moved_before": bool((between != start).any()),
        "step_error": float((start - after - gradient).abs().max() / gradient.abs().max()),
        "norm_error": None if norm is None else abs(float(norm) / float(gradient.norm()) - 1),
        "mastered": master is not None,
        "refreshes": hasattr(engine.optimizer, "refresh_fp32_params"),
    }


def _write(stage: int, bfloat16: bool) -> dict[str, Any]:
    """A value is written as core_training/models/parameters.py does, and a step with a learning rate of 0 follows."""
    import torch
    from deepspeed import zero
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    _, accelerator, model, engine, _, _ = _prepared(stage, bfloat16, lambda p: torch.optim.SGD(p, lr=0.0))
    weight = model[0].weight
    wanted = torch.arange(30.0).reshape(5, 6) / 7
    _step(accelerator, engine, bfloat16)
    engine.empty_partition_cache()
    with torch.no_grad():
        if hasattr(weight, "ds_id"):
            part = torch.zeros_like(safe_get_local_fp32_param(weight))
            part[:30] = wanted.flatten()
            safe_set_local_fp32_param(weight, part)
            with zero.GatheredParameters([weight], modifier_rank=0):
                weight.copy_(wanted)
        else:
            if safe_get_full_fp32_param(weight) is not None:
                safe_set_full_fp32_param(weight, wanted)
            weight.copy_(wanted)
    computed = engine(torch.eye(6, dtype=weight.dtype))
    expected = (wanted.to(weight.dtype).T @ _value(model[1].weight).to(weight.dtype).T).float()
    _step(accelerator, engine, bfloat16)
    master = safe_get_full_fp32_param(weight)
    return {
        "computed": float((computed.float() - expected).abs().max()),
        "kept": float((_value(weight) - wanted.to(weight.dtype).float()).abs().max()),
        "master": None if master is None else float((master.flatten()[:30].reshape(5, 6) - wanted).abs().max()),
    }


def _forget(stage: int) -> float:
    """How far a step is from a fresh optimizer's, after its memory was set to zero in place."""
    import torch

    _, accelerator, model, engine, _, made = _prepared(stage, False, lambda p: torch.optim.AdamW(p, lr=0.1))
    for _ in range(2):
        _step(accelerator, engine, False)
    for state in made.state.values():
        for name, value in state.items():
            state[name] = value.zero_() if torch.is_tensor(value) else 0
    before = _value(model[0].weight)
    _step(accelerator, engine, False)
    moved = _value(model[0].weight) - before
    # The first step of Adam is the learning rate in the direction of each gradient, and the decay.
    return float(((moved + 0.1 * 0.01 * before).abs() - 0.1).abs().max())


def _checkpoint(folder: str) -> dict[str, Any]:
    import torch

    def adam(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=0.1)

    _, accelerator, model, engine, _, _ = _prepared(2, False, adam)
    _step(accelerator, engine, False)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    saved = torch.load(next(Path(folder).rglob("*model_states.pt")), weights_only=False)["module"]
    _step(accelerator, engine, False)
    uninterrupted = _value(model[0].weight)
    _, accelerator, model, engine, _, _ = _prepared(2, False, adam)
    options = {"load_module_strict": False, "load_lr_scheduler_states": False}
    nothing = engine.load_checkpoint(f"{folder}/nowhere", **options)
    found = engine.load_checkpoint(folder, **options)
    _step(accelerator, engine, False)
    return {
        "saved": sorted(saved),
        "nothing": nothing[0] is None and len(nothing) == 2,
        "found": found[0] is not None and len(found) == 2,
        "resumed": float((_value(model[0].weight) - uninterrupted).abs().max()),
    }


def _zero3_while_loading() -> dict[str, Any]:
    """Whether a model is made in parts, before and after transformers is told that there is no DeepSpeed."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    plugin = _plugin(3, False, _model(False))  # transformers holds it weakly
    before = is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()
    assert plugin is not None
    return {"before": before, "after": is_deepspeed_zero3_enabled()}


KINDS = {"0": (0, False), "1-bfloat16": (1, True), "2": (2, False), "2-bfloat16": (2, True), "3": (3, False)}


def _main(file: str) -> None:
    import torch.distributed as dist

    folder = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    import deepspeed
    import torch

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    found: dict[str, Any] = {
        "engines": {name: _look_at(*kind) for name, kind in KINDS.items()},
        "written": {name: _write(*kind) for name, kind in KINDS.items()},
        "forgotten": {str(stage): _forget(stage) for stage in (0, 1, 2, 3)},
        "checkpoint": _checkpoint(f"{folder}/checkpoint"),
    }
    clip = _prepared(1, False, lambda p: torch.optim.SGD(p, lr=1.0), clip=0.25)
    start = _value(clip[2][0].weight)
    _step(clip[1], clip[3], False)
    found["clipped"] = float((start - _value(clip[2][0].weight)).norm())
    found["clipping"] = clip[3].gradient_clipping()
    found["loading"] = _zero3_while_loading()
    Path(file).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may abort a process that ends by itself


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process found. The first time on a machine it compiles an extension, which takes a minute."""
    file = tmp_path_factory.mktemp("deepspeed") / "found.json"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.contracts.test_deepspeed", str(file)],
        env={**os.environ, **alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert file.exists(), done.stderr[-3000:]
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


# --- what it found


@leans("core_training/engine/preparation.py", "core_training/models/prepared_model.py")
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_is_prepared_around_the_model_and_our_optimizer_is_inside(found: dict[str, Any], kind: str) -> None:
    engine = found["engines"][kind]
    assert engine["engine"]
    assert engine["unwrapped"]
    assert engine["optimizer"], "the innermost `optimizer` is not the one that was given"


@leans("core_training/engine/deepspeed_config.py")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_automatic_and_what_was_said_is_what_the_engine_does(found: dict[str, Any], kind: str) -> None:
    stage, bfloat16 = KINDS[kind]
    engine = found["engines"][kind]
    assert not engine["auto"]
    assert engine["config"] == {"clipping": 0.0, "untested": True, "bfloat16": bfloat16, "stage": stage}


@leans("core_training/models/parameters.py")
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_bears_a_number_and_its_shape_exactly_under_zero_3(found: dict[str, Any], kind: str) -> None:
    engine = found["engines"][kind]
    assert engine["partitioned"] == [kind == "3"] * 3
    assert engine["shape"] == [5, 6]


@leans("core_training/engine/step_loop.py")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_taken_in_the_backward_that_is_said_to_be_the_last_with_the_sum_of_the_gradients(
    found: dict[str, Any], kind: str
) -> None:
    engine = found["engines"][kind]
    assert not engine["moved_before"], "a step is taken in a backward that is not the last"
    assert engine["step_error"] < (2e-2 if "bfloat16" in kind else 1e-5), "the gradients are divided by their number"


@leans("core_training/engine/step_loop.py")
@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_tells_the_norm_of_a_steps_gradient_or_nothing_in_float32_without_zero(
    found: dict[str, Any], kind: str
) -> None:
    error = found["engines"][kind]["norm_error"]
    if kind == "0":
        assert error is None
    else:
        assert error is not None
        assert error < (2e-2 if "bfloat16" in kind else 1e-5)


@leans("core_training/engine/deepspeed_config.py")
def test_a_gradient_is_clipped_to_the_norm_that_was_asked_for(found: dict[str, Any]) -> None:
    assert found["clipping"] == 0.25
    assert found["clipped"] == pytest.approx(0.25, rel=1e-3)


@leans("core_training/models/parameters.py")
@pytest.mark.parametrize("kind", KINDS)
def test_there_are_master_copies_within_reach_under_zero(found: dict[str, Any], kind: str) -> None:
    assert found["engines"][kind]["mastered"] == (kind != "0")
    assert found["engines"][kind]["refreshes"] == (kind != "0")


@leans("core_training/models/parameters.py")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_to_parameter_and_master_is_computed_with_and_outlives_a_step(
    found: dict[str, Any], kind: str
) -> None:
    written = found["written"][kind]
    assert written["computed"] < (5e-2 if "bfloat16" in kind else 1e-5)
    assert written["kept"] == 0, "a step undoes what was written"
    assert written["master"] in (None, 0.0)


@leans("core_training/engine/step_loop.py")
@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_an_optimizer_whose_memory_is_zeroed_in_place_begins_anew(found: dict[str, Any], stage: str) -> None:
    assert found["forgotten"][stage] < 1e-4


@leans("core_training/engine/step_loop.py")
def test_a_checkpoint_is_without_frozen_weights_goes_on_exactly_and_one_that_is_missing_is_told(
    found: dict[str, Any],
) -> None:
    checkpoint = found["checkpoint"]
    assert checkpoint["saved"] == ["0.weight"]
    assert checkpoint["nothing"]
    assert checkpoint["found"]
    assert checkpoint["resumed"] == 0


@leans("core_training/distributed/group.py")
def test_transformers_forgets_an_engine_when_it_is_told_to(found: dict[str, Any]) -> None:
    assert found["loading"]["before"] is True
    assert found["loading"]["after"] is False


@leans("core_training/engine/deepspeed_config.py")
def test_the_setting_that_is_refused_goes_by_this_name() -> None:
    config = look_up("core_training/engine/deepspeed_config.py", "deepspeed.runtime.zero.config:DeepSpeedZeroConfig")
    assert {
        "round_robin_gradients",
        "contiguous_gradients",
        "reduce_scatter",
        "allgather_bucket_size",
        "reduce_bucket_size",
        "offload_optimizer",
        "offload_param",
    } <= config.model_fields.keys()
    aliases = {field.alias for field in config.model_fields.values()}
    assert {
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_gather_16bit_weights_on_model_save",
    } <= aliases | config.model_fields.keys()


if __name__ == "__main__":
    _main(sys.argv[1])
