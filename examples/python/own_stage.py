"""A stage of your own: fine-tuning in which surprising tokens count less (focal loss, Lin et al. 2017).

`python -m examples.python.own_stage BASE_MODEL RECORDS.jsonl OUT`; a record has `prompt` and `completion`.
"""

import sys

from core_training.parts.data_kinds import CONVERSATION
from core_training.parts.section import Section
from core_training.parts.stages.stage_part import StagePart
from fedloom import STAGES


class Calm(Section):
    """Stage `calm`: fine-tuning that is not led by what the model finds impossible."""

    gamma: float = 1.0


CALM = StagePart[Calm](
    name="calm",
    target="examples.python.calm_loss:CalmStage",
    settings=Calm,
    reads=CONVERSATION,
    unit="tokens",
    learning_rate=2e-5,
    adapter_learning_rate=2e-4,
)
STAGES.add(CALM)  # before the first recipe is made; an installed package names it as an entry point instead


def main(model: str, records: str, out: str) -> None:
    from fedloom import Recipe, train

    data = {"train": records, "eval_fraction": 0.2}
    recipe = Recipe(model={"name_or_path": model}, stage="calm", data=data, training={"max_steps": 4}, output=out)
    print(f"held-out loss: {train(recipe).eval_loss:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
