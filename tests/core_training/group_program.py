"""Runs in each process of a DeepSpeed group: writes a state, evaluates, steps with learning rate 0, evaluates again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import core_training.offline  # noqa: F401
from core_training.central import total
from core_training.group import lead_or_follow
from core_training.recipe import load_recipe
from core_training.state import TrainableState


def main() -> None:
    recipe_file, target_file, result_file = (Path(argument) for argument in sys.argv[1:])
    engine = lead_or_follow(load_recipe(recipe_file))
    target = TrainableState.from_bytes(target_file.read_bytes(), engine.manifest)
    result = {"before": total(engine.evaluate()).loss}
    engine.write_state(target)
    result["read_back"] = float(abs(engine.read_state().buffer - target.buffer).max())
    result["after_write"] = total(engine.evaluate()).loss
    engine.train(1)
    result["after_step"] = total(engine.evaluate()).loss
    result["engine"] = type(engine._engine._current.trainer.model_wrapped).__name__
    engine.checkpoint(result_file.with_suffix(".checkpoint"))
    engine.write_state(engine.initial_state)
    engine.restore(result_file.with_suffix(".checkpoint"))
    result["after_restore"] = total(engine.evaluate()).loss
    result_file.write_text(json.dumps(result))
    engine.close()


if __name__ == "__main__":
    main()
