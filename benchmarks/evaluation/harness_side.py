"""lm-evaluation-harness on task files: `python harness_side.py MODEL TASKS ROUNDS NAME…`, in its own environment.

Prints JSON: the seconds of each round, the accuracy of each task, and the log-likelihoods of each item's choices.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict


def main(model: str, tasks: str, rounds: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    manager = TaskManager(include_path=tasks, include_defaults=False)
    # In the order of lengths that it puts requests into, a batch of 16 is as fast as any here.
    subject = HFLM(pretrained=model, device="cpu", dtype="float32", batch_size=16)
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        found = evaluate(lm=subject, task_dict=get_task_dict(names, manager), log_samples=True, bootstrap_iters=0)
        seconds.append(time.process_time() - began)
    samples = {
        name: [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in found["samples"][name]]
        for name in names
    }
    accuracy = {name: found["results"][name]["acc,none"] for name in names}
    print(json.dumps({"seconds": seconds, "accuracy": accuracy, "logps": samples}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
