"""Runs in each process of a DeepSpeed group: trains every recipe of a folder, or looks how it takes a written state.

Each NAME.yaml gives a NAME.json with the figures; where there is a NAME.state, it is written first.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import core_training.foundation.environment  # noqa: F401
from core_training.distributed.group import GroupEngine, join_or_follow
from core_training.distributed.leaving import leave
from core_training.foundation.state import TrainableState
from core_training.foundation.trainable import Trainable, total
from core_training.recipe.reading import load_recipe


def figures(engine: Trainable) -> dict[str, Any]:
    """What training to the end comes to; the same function gives what one process alone comes to."""
    steps = [engine.train(1) for _ in range(engine.total_steps)]
    return {
        "losses": [report.loss_mean for report in steps],
        "weights": [report.weight for report in steps],
        "evaluation": asdict(total(engine.evaluate())),
        "state": engine.read_state().buffer.tolist(),
    }


def written(engine: GroupEngine, target: TrainableState, folder: Path) -> dict[str, Any]:
    """Write, evaluate, step with learning rate 0, evaluate again."""
    result: dict[str, Any] = {"before": total(engine.evaluate()).loss}
    engine.begin_round(target)
    result["read_back"] = float(abs(engine.read_state().buffer - target.buffer).max())
    result["after_write"] = total(engine.evaluate()).loss
    engine.train(1)
    result["after_step"] = total(engine.evaluate()).loss
    result["engine"] = type(engine._engine._current.prepared.model).__name__
    engine.checkpoint(folder)
    engine.begin_round(engine.initial_state)
    engine.restore(folder)
    result["after_restore"] = total(engine.evaluate()).loss
    return result


def main() -> None:
    join_or_follow()
    engine: GroupEngine | None = None
    for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
        if engine is not None:
            engine._engine.close()
        engine = GroupEngine(load_recipe(path))
        state = path.with_suffix(".state")
        if state.exists():
            target = TrainableState.from_bytes(state.read_bytes(), engine.manifest)
            result = written(engine, target, path.with_suffix(".checkpoint"))
        else:
            result = figures(engine)
        path.with_suffix(".json").write_text(json.dumps(result))
    assert engine is not None
    engine.close()
    leave(0)


if __name__ == "__main__":
    main()
