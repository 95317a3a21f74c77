"""A notebook in a file: train, look at the curve, try another rank, compare both on new records.

`python -m examples.python.notebook BASE_MODEL RECORDS.jsonl NEW.jsonl OUT`; a record has `text`.
"""

import sys

from fedloom import evaluate, load_recipe, load_run, train

RECIPE = """
model: {name_or_path: MODEL}
stage: pretrain
tuning: {lora: {r: 2}}
data: {train: RECORDS}
training: {max_steps: 4, save_steps: 2, max_length: 64}
"""


def main(model: str, records: str, new: str, out: str) -> None:
    with open(f"{out}.yaml", "w") as file:
        file.write(RECIPE.replace("MODEL", model).replace("RECORDS", records))
    for rank in (2, 4):
        recipe = load_recipe(f"{out}.yaml", [f"tuning.lora.r={rank}", f"output={out}/rank-{rank}"])
        train(recipe)
        run = load_run(recipe.output)
        print(f"rank {rank}:", [round(point.eval_loss, 3) for point in run.status().curve.values()])
        report = evaluate(recipe.output, new)
        print(f"on {report.examples} new records: {report.loss:.3f}, {report.metrics}")


if __name__ == "__main__":
    main(*sys.argv[1:])
