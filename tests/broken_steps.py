"""Real errors in real processes: a reward function that breaks the process it is called in, once.

A reward function is code of the site's own, so whatever runs it (the command, a worker, a node's worker) needs no part
in the test. It mends what it broke as it breaks.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

BREAKING = {
    "shape": "grpo.kl_estimates = once(lambda kl: torch.ones(3, 4) @ torch.ones(5, 6))",
    "memory": "limit_memory(); grpo.kl_estimates = once(lambda kl: torch.empty(1 << 30))",
    "backward": "grpo.kl_estimates = once(FailsBackward.apply)",
    "optimizer": "adam.adam = once_of(adam, 'adam', lambda *a, **k: torch.ones(3, 4) @ torch.ones(5, 6))",
    "loss": "grpo.kl_estimates = once(lambda kl: kl * float('nan'))",
    "unreached": "grpo.BatchLoss = once_of(grpo, 'BatchLoss', unreached)",
}
SAID = {
    "shape": r"the forward pass of step {step} failed: RuntimeError: mat1 and mat2 shapes .*",
    "memory": r"out of memory in the forward pass of step {step} \(asked for 4.00 GiB\); lower "
    r"training\.per_device_train_batch_size \(4\) or training\.max_length \(64\) or rollout\.max_new_tokens \(8\).*",
    "backward": r"the backward pass of step {step} failed: RuntimeError: mat1 and mat2 shapes .*",
    "optimizer": r"the optimizer of step {step} failed: RuntimeError: mat1 and mat2 shapes .*",
    "loss": r"the training loss is no longer finite at step {step}; lower training\.learning_rate",
    "unreached": r"nothing that is trained enters the loss of stage 'grpo'; let tuning\.lora reach layers that .*",
}
TOLD = {
    "shape": r"the forward pass of step {step} failed \(RuntimeError\)",
    "memory": r"out of memory in the forward pass of step {step}",
    "backward": r"the backward pass of step {step} failed \(RuntimeError\)",
    "optimizer": r"the optimizer of step {step} failed \(RuntimeError\)",
    "loss": SAID["loss"],
    "unreached": SAID["unreached"],
}
GRPO = {
    "stage": "grpo",
    "data": {"columns": {"prompt": "question"}},
    "rollout": {"max_new_tokens": 8},
    "grpo": {"num_generations": 2},
}
"""What a recipe needs besides: eight answers to a batch of four prompts."""
ANSWERS = 8


def write_judge(folder: Path, breaking: str, at: int, only: str = "True") -> Path:
    """Write a reward function that breaks its process at its `at`-th training step, while `folder`/armed exists.

    `only` is a condition in Python, in which `os` is known.
    """
    (folder / "judge.py").write_text(
        dedent(
            f"""
            import os
            import resource
            from pathlib import Path

            import torch
            from torch.optim import adam

            from core_training.stages import grpo

            ARMED = Path(__file__).with_name("armed")
            steps = 0


            def judge(prompts, completions):
                global steps
                steps += len(completions) == {ANSWERS}
                if len(completions) == {ANSWERS} and steps == {at} and {only} and ARMED.exists():
                    ARMED.unlink()
                    {BREAKING[breaking]}
                return [len(set(text)) / 10 for text in completions]


            def once_of(module, name, broken):
                inner = getattr(module, name)

                def call(*arguments, **named):
                    setattr(module, name, inner)
                    try:
                        return broken(*arguments, **named)
                    finally:
                        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

                return call


            def once(broken):
                inner = grpo.kl_estimates
                return once_of(grpo, "kl_estimates", lambda *arguments: broken(inner(*arguments)))


            def limit_memory():
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                most = pages * resource.getpagesize() + (64 << 20)
                resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


            def unreached(**sums):
                from core_training.stages.base import BatchLoss

                return BatchLoss(**{{**sums, "total": sums["total"].detach()}})


            class FailsBackward(torch.autograd.Function):
                @staticmethod
                def forward(context, value):
                    return value.clone()

                @staticmethod
                def backward(context, gradient):
                    return torch.ones(3, 4) @ torch.ones(5, 6)
            """
        )
    )
    (folder / "armed").touch()
    return folder / "judge.py"
