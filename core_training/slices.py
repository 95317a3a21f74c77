"""Pausing a Hugging Face trainer between two steps, without fighting it.

One `Trainer.train()` lives for the whole run, inside a greenlet: a callback hands control back to the owner at the end
of a slice, and the next slice resumes it there. Optimizer, schedule and data order simply go on. A greenlet costs no
thread, so hundreds of paused trainers fit in one process; all of one model's must be used from one thread.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenlet
import numpy as np
import torch
from transformers import TrainerCallback


class _Pause(TrainerCallback):  # type: ignore[misc]
    def __init__(self, owner: SlicedRun) -> None:
        self._owner = owner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._owner.pause()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._owner.step_done(state.global_step)


class SlicedRun:
    """One paused training run."""

    def __init__(self, trainer: Any, resume_from: str | None = None) -> None:
        """Prepare the trainer (optimizer, schedule, DeepSpeed engine) up to just before its first step."""
        self.trainer = trainer
        self._target_step = 0
        self._on_step: Callable[[int, int], None] | None = None
        self._stop_asked = False
        trainer.add_callback(_Pause(self))
        self._random_state: Any = None
        self._greenlet = greenlet.greenlet(lambda: trainer.train(resume_from_checkpoint=resume_from))
        self._switch()

    @property
    def step(self) -> int:
        return int(self.trainer.state.global_step)

    @property
    def total_steps(self) -> int:
        return int(self.trainer.state.max_steps)

    def advance(self, steps: int, on_step: Callable[[int, int], None] | None = None) -> None:
        """Train `steps` optimizer steps further, or fewer if `stop` is called.

        The caller's random number generators are left as they were.
        """
        self._target_step = self.step + steps
        self._on_step = on_step
        self._stop_asked = False
        outside = _random_state()
        _set_random_state(self._random_state)
        try:
            self._switch()
        finally:
            _set_random_state(outside)

    def skip(self, steps: int) -> None:
        """Pass over steps that were not taken: the schedule stands where it would stand after them."""
        scheduler = getattr(self.trainer.model_wrapped, "lr_scheduler", None) or self.trainer.lr_scheduler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch expects an optimizer step before each of the schedule
            for _ in range(steps):
                scheduler.step()

    def save(self, folder: Path) -> None:
        """Write optimizer, schedule, random numbers and progress to `folder`; every process of a group must."""
        outside = _random_state()
        _set_random_state(self._random_state)
        trainer = self.trainer
        scratch = folder.with_name(f"{folder.name}-saving")
        trainer.args.output_dir = str(scratch)
        try:
            (scratch / f"checkpoint-{self.step}").mkdir(parents=True, exist_ok=True)
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.accelerator.wait_for_everyone()
            if trainer.accelerator.is_main_process:
                (scratch / f"checkpoint-{self.step}").rename(folder)
                scratch.rmdir()
        finally:
            _set_random_state(outside)

    def stop(self) -> None:
        """Let the running slice end after its present step."""
        self._stop_asked = True

    def step_done(self, step: int) -> None:
        """Called inside the greenlet after each optimizer step."""
        if self._on_step is not None:
            self._on_step(step, self.total_steps)
        if step >= self._target_step or self._must_stop():
            self.pause()

    def pause(self) -> None:
        """Called inside the greenlet: give control back to the owner until the next slice."""
        self._greenlet.parent.switch()

    def close(self) -> None:
        """Unwind the trainer's frames."""
        if not self._greenlet.dead:
            self._greenlet.throw(greenlet.GreenletExit)

    def _must_stop(self) -> bool:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes > 1:  # all ranks must stop at the same step, whoever was asked
            asked = torch.tensor([float(self._stop_asked)], device=accelerator.device)
            return bool(accelerator.reduce(asked, reduction="sum").item())
        return self._stop_asked

    def _switch(self) -> None:
        self._greenlet.parent = greenlet.getcurrent()
        self._greenlet.switch()
        self._random_state = _random_state()


def _random_state() -> Any:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: Any) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
