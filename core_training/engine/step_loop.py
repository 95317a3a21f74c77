"""The loop of optimizer steps: one for every stage, which pauses by returning.

Optimizer, schedule, random numbers and place in the data are kept between two calls, so hundreds of paused loops fit in
one process. What a step did is undone when it fails, unless the optimizer had begun to change the parameters.
"""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import accumulate, islice
from operator import add
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from core_training.data.examples import Batch, Row
from core_training.engine.batch_order import BatchOrder
from core_training.engine.dataset import Units
from core_training.engine.failures import nothing_trained, run_error
from core_training.engine.preparation import prepare, torch_optimizer
from core_training.engine.private_steps import PrivateSteps
from core_training.engine.random_state import RandomState
from core_training.engine.step_ledger import StepLedger, TakenStep
from core_training.foundation.errors import DivergedError, FedloomError, RunError
from core_training.foundation.trainable import OnFigures
from core_training.privacy.mechanism import RecordMechanism
from core_training.stages.base import BatchLoss, Stage

_log = logging.getLogger(__name__)
_PROGRESS_FILE = "progress.pt"
_DEEPSPEED_FOLDER = "deepspeed"


class StepLoop:
    """A run's optimizer steps on a stage's model and rows. Every process of a group makes one, and the same calls."""

    def __init__(self, stage: Stage[Any], rows: Sequence[Row], units: Units | None = None) -> None:
        """Prepare model, optimizer and schedule up to just before the first step.

        `units` says whose each row is, where the recipe hides whose rows are trained on (differential privacy).
        """
        training = stage.recipe.training
        mechanism = RecordMechanism.of(stage.recipe, units.count) if units is not None else None
        self._stage = stage
        self._rows = rows
        self._order = BatchOrder(
            len(rows), training.per_device_train_batch_size, training.seed, *_place_in_group(stage)
        )
        self._accumulated = training.gradient_accumulation_steps
        self._steps_per_epoch = math.ceil(self._order.batches / self._accumulated)
        self.total_steps: int = stage.recipe.total_steps or math.ceil(training.num_train_epochs * self._steps_per_epoch)
        if mechanism is not None:
            self.total_steps = mechanism.steps
        with _random_numbers_kept():
            set_seed(training.seed)
            self.prepared, self._optimizer, self._schedule = prepare(stage, self.total_steps)
            # The run's own numbers from here on: other loops of the process draw between two calls of `advance`.
            self._random = RandomState.present()
        self._trained = [p for p in stage.base.model.parameters() if p.requires_grad]
        self._private: PrivateSteps | None = None
        if mechanism is not None and units is not None:
            self._private = PrivateSteps(stage, self.prepared, rows, units.of_rows, mechanism)
        self.step = 0
        """Optimizer steps of the run so far; one of a sampling stage makes several updates."""
        self._led_nowhere = 0
        """Those of them that it went back over."""
        self.ledger = StepLedger(self.prepared.total)
        """The figures of the last slice's whole steps."""
        self._logging_steps = training.logging_steps
        self._memory: dict[str, float] = {}
        self._epoch: Iterator[list[Batch]] | None = None
        self._phase = ""
        self._torn = False
        self._stop_asked = False

    @property
    def steps_left(self) -> int:
        """Steps that the run may still have."""
        return self.total_steps - (self.step - self._led_nowhere)

    @property
    def is_whole(self) -> bool:
        """Whether all that this loop holds is as it was at the end of a step; if not, only `load` helps."""
        return not self._torn

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """PyTorch's own optimizer."""
        return torch_optimizer(self._optimizer)

    @property
    def _inner_schedule(self) -> Any:
        """The schedule of PyTorch or DeepSpeed, without accelerate's wrapper, whose steps do nothing."""
        return getattr(self._schedule, "scheduler", self._schedule)

    def advance(
        self,
        steps: int,
        on_step: Callable[[int, int], None] | None = None,
        on_figures: OnFigures | None = None,
    ) -> None:
        """Take `steps` optimizer steps, or fewer if `stop` is called; `on_step(step, total)` follows each.

        `on_figures` is told the figures of each `training.logging_steps` steps of the run, and of its last ones. The
        caller's random number generators are left as they were. Raises RunError for a step that fails.
        """
        if self._torn:
            raise RunError(f"step {self.step + 1} failed half-way; go back to a checkpoint")
        self._stop_asked = False
        self.ledger.begin_slice()
        with _random_numbers_kept():
            self._random.put_back()
            for _ in range(steps):
                self.ledger.add(self._take_step())
                self.step += 1
                # After each whole step: a step that fails leaves the numbers with which it began.
                self._random = RandomState.present()
                if self.step % self._logging_steps == 0 or self.steps_left == 0:
                    figures = self.ledger.figures(self.step)  # of all processes, so each of them must ask
                    if on_figures is not None:
                        on_figures(figures)
                if on_step is not None:
                    on_step(self.step, self.total_steps)
                if self._must_stop():
                    break

    def skip(self, steps: int) -> None:
        """Pass over steps that were not taken: the schedule stands where it would stand after them.

        Fewer than none go back: the schedule stands where it stood before as many that led to nothing.
        """
        if steps < 1:
            self._go_back(-steps)
            return
        schedule = self._inner_schedule
        if not isinstance(schedule, LambdaLR):  # one of DeepSpeed's own
            schedule.step(schedule.last_batch_iteration + steps)
            return
        schedule.last_epoch += steps - 1  # what it says is a function of the step's number alone
        schedule._step_count += steps - 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch expects an optimizer step before each of the schedule
            schedule.step()

    def _go_back(self, steps: int) -> None:
        self._led_nowhere += steps
        schedule = self._inner_schedule
        if isinstance(schedule, LambdaLR):
            schedule.last_epoch -= steps
            self._follow_schedule()
        else:  # one of DeepSpeed's own
            schedule.step(schedule.last_batch_iteration - steps)

    def stop(self) -> None:
        """Let the running slice end after its present step (safe to call from a signal handler)."""
        self._stop_asked = True

    def forget_moments(self) -> None:
        """Set the optimizer back to how it was before its first step; learning rate and schedule go on."""
        if self.prepared.deepspeed_engine is None:
            self.optimizer.state.clear()  # in eight bits, zeros are not what zero means
            return
        for state in self.optimizer.state.values():
            for name, value in state.items():
                # In place, as DeepSpeed keeps other names for the same tensors.
                state[name] = value.zero_() if torch.is_tensor(value) else 0

    def save(self, folder: Path) -> None:
        """Write optimizer, schedule, random numbers and place in the data; every process of a group must."""
        folder.mkdir(parents=True, exist_ok=True)
        prepared = self.prepared
        torch.save(self._random.plain(), folder / f"random-{prepared.process}.pt")
        if prepared.deepspeed_engine is not None:
            prepared.deepspeed_engine.save_checkpoint(str(folder / _DEEPSPEED_FOLDER), exclude_frozen_parameters=True)
        if prepared.process == 0:
            # DeepSpeed's own checkpoint has its optimizer, of which each process may hold a part.
            optimizer = None if prepared.deepspeed_engine is not None else self._optimizer.state_dict()
            schedule = self._inner_schedule.state_dict()
            progress = {
                "step": self.step,
                "led_nowhere": self._led_nowhere,
                "memory": self._memory,
                "schedule": schedule,
                "optimizer": optimizer,
                "figures": self.ledger.plain(),
            }
            torch.save(progress, folder / _PROGRESS_FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, in a loop that has taken no step. Raises RunError when it is damaged."""
        progress, self._random = read_progress(folder)
        try:
            self._inner_schedule.load_state_dict(progress["schedule"])
            if progress["optimizer"] is not None:
                self._optimizer.load_state_dict(progress["optimizer"])
            self.step, self._memory = progress["step"], progress["memory"]
            self._led_nowhere = progress.get("led_nowhere", 0)
            self.ledger.take_over(progress.get("figures"))
        except (KeyError, ValueError) as error:
            raise RunError(f"{folder}: a checkpoint of another recipe or version: {error}") from error
        if (engine := self.prepared.deepspeed_engine) is not None:
            # Adapters are saved without the model around them.
            found, _ = engine.load_checkpoint(
                str(folder / _DEEPSPEED_FOLDER), load_module_strict=False, load_lr_scheduler_states=False
            )
            if found is None:
                raise RunError(f"{folder / _DEEPSPEED_FOLDER}: DeepSpeed finds no checkpoint here")
        self._follow_schedule()

    def _follow_schedule(self) -> None:
        """Set the learning rate that the schedule has for the next step.

        The one in the checkpoint is another where the run has been made longer, and its schedule with it.
        """
        schedule = self._inner_schedule
        if isinstance(schedule, LambdaLR):  # all of transformers' are; one of DeepSpeed's own keeps its rates itself
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, peak, factor in zip(self.optimizer.param_groups, schedule.base_lrs, factors, strict=True):
                group["lr"] = peak * factor

    def _take_step(self) -> TakenStep:
        """Take one step of the run; return the losses and gradients that it is made from."""
        changed = False
        # Now: under DeepSpeed a schedule may go on within the step.
        step = TakenStep(learning_rate=self.optimizer.param_groups[0]["lr"])
        try:
            for losses in self._gradients():
                step.losses += losses
                self._phase = "clipping the gradient"
                step.grad_norms.append(self._clip_gradient())
                self._report_unreached()
                # Before the optimizer's step: one that fails within may have changed some parameters.
                self._phase, changed = "the optimizer", True
                self._optimizer.step()
                self._forget_gradients()
            self._schedule.step()
        # Ctrl-C too must leave neither gradients nor a half-read epoch behind.
        except BaseException as error:
            self._undo(changed=changed)
            if isinstance(error, FedloomError) or not isinstance(error, Exception):
                raise
            raise run_error(error, f"{self._phase} of step {self.step + 1}", self._stage.recipe) from error
        return step

    def _gradients(self) -> Iterator[list[BatchLoss]]:
        """Leave the gradient of each update that the step is made of; yield the losses that it is from."""
        self._phase = "reading the data"
        if self._private is not None:
            yield self._private.leave_gradient()
            return
        batches = self._next_batches()
        self._phase = "the rollout" if self._stage.recipe.stage_part.samples else self._phase
        for update in self._stage.updates(self.prepared, batches, self._memory):
            yield self._accumulate(update)

    def _forget_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _undo(self, *, changed: bool) -> None:
        """Make a failed step one that was never begun, so far as that is possible."""
        self._forget_gradients()
        # The iterator is past the failed step's batches: the next step opens the epoch anew.
        self._epoch = None
        # A process of a group knows nothing of how far the others came.
        self._torn = changed or self.prepared.deepspeed_engine is not None

    def _next_batches(self) -> list[list[Batch]]:
        """The step's batches, each in the parts that are computed together; an epoch's last step may have fewer."""
        epoch, taken = divmod(self.step, self._steps_per_epoch)
        if self._epoch is None or taken == 0:
            batches: DataLoader[list[Batch]] = DataLoader(
                self._rows,  # type: ignore[arg-type]  # a sequence is all that it needs
                batch_sampler=self._order.epoch(epoch)[taken * self._accumulated :],
                collate_fn=self.prepared.batches,
                pin_memory=self.prepared.device.type == "cuda",
            )
            self._epoch = iter(batches)
            if taken > 0:  # opening an epoch draws a random number, and this one was opened before
                self._random.put_back()
        return [[self.prepared.placed(part) for part in batch] for batch in islice(self._epoch, self._accumulated)]

    def _accumulate(self, update: Sequence[Sequence[Batch]]) -> list[BatchLoss]:
        """Leave the gradient of the mean loss over the units of all batches, at all processes; return the losses."""
        prepared, stage = self.prepared, self._stage
        stage.set_mode(prepared.model)
        parts = [part for batch in update for part in batch]
        # Counted ahead of all forwards: each part's loss is divided by the units of the whole step at all processes.
        units = prepared.total(torch.stack([stage.weight(part) for part in parts]).sum()).clamp(min=1)
        losses = []
        for number, part in enumerate(parts, start=1):
            self._phase = "the forward pass"
            loss = stage.loss(prepared.model, part)
            losses.append(loss.detached())
            last = prepared.accelerator.sync_gradients = number == len(parts)
            self._phase = "the backward pass"
            if prepared.deepspeed_engine is None:
                prepared.accelerator.backward(loss.total / units)
            else:
                if last:  # in this backward DeepSpeed takes its step
                    self._check_loss(losses)
                # It averages the gradients over the processes.
                prepared.accelerator.backward(loss.total / units * prepared.processes, scale_wrt_gas=False)
            del loss  # with its graph, before the next part makes one
        if prepared.deepspeed_engine is None:
            self._check_loss(losses)
        # Parts are there to save memory; a report is of whole batches.
        ends = accumulate(map(len, update))
        return [reduce(add, losses[end - len(batch) : end]) for batch, end in zip(update, ends, strict=True)]

    def _report_unreached(self) -> None:
        """Say, once for all runs of a model, which trained tensors its first loss does not depend on.

        Raises RunError where that is all of them: under gradient checkpointing a loss has a graph in any case.
        """
        base = self._stage.base
        if base.reach_is_known or self.prepared.deepspeed_engine is not None or self._private is not None:
            return
        parameters = base.trainable_parameters
        unreached = [name for name, parameter in parameters.items() if parameter.grad is None]
        if len(unreached) == len(parameters):
            raise nothing_trained(self._stage.recipe)
        base.reach_is_known = True
        if unreached:
            _log.warning(
                "warning: %d of %d trained tensors have no part in the first step's loss, such as %s",
                *(len(unreached), len(parameters), unreached[0]),
            )

    def _check_loss(self, losses: Sequence[BatchLoss]) -> None:
        """Raise DivergedError, at all processes, where the sum of the losses is no number."""
        if not math.isfinite(self.prepared.total(torch.stack([loss.total for loss in losses]).sum())):
            raise self._diverged("training loss")

    def _clip_gradient(self) -> torch.Tensor | None:
        """Clip the gradient as the recipe says; return its norm before that, or None where nobody keeps it.

        Raises DivergedError where it is no number.
        """
        if self.prepared.deepspeed_engine is not None:  # it has clipped, and taken its step
            return self._norm_by_deepspeed()
        # Each unit's gradient has been clipped already, and what is left is mostly noise.
        most = self._stage.recipe.training.max_grad_norm if self._private is None else 0.0
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if not math.isfinite(norm):
            raise self._diverged("gradient")
        # PyTorch multiplies by most / (norm + 1e-6), or by 1 if that is more: then the gradients need not be touched.
        if 0 < most < norm + 1e-6:
            torch.nn.utils.clip_grads_with_norm_(self._trained, most, norm)
        return norm

    def _norm_by_deepspeed(self) -> torch.Tensor | None:
        norm = self.prepared.deepspeed_engine.get_global_grad_norm()
        # In float32 without ZeRO it keeps none: a gradient shows in what it was added to.
        shown = torch.nn.utils.get_total_norm(self._trained) if norm is None else norm
        if not math.isfinite(shown):
            raise self._diverged("gradient")
        return None if norm is None else torch.as_tensor(norm)

    def _diverged(self, what: str) -> DivergedError:
        return DivergedError(f"the {what} is no longer finite at step {self.step + 1}; lower training.learning_rate")

    def _must_stop(self) -> bool:
        """Whether any process of the group was asked to stop: all must do so at the same step."""
        if self.prepared.processes == 1:
            return self._stop_asked
        return bool(self.prepared.total(torch.tensor([float(self._stop_asked)], device=self.prepared.device)).item())


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Leave the process's random number generators as they are now when the block ends."""
    outside = RandomState.present()
    try:
        yield
    finally:
        outside.put_back()


def _place_in_group(stage: Stage[Any]) -> tuple[int, int]:
    """This process's number and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if stage.recipe.deepspeed.used else (0, 1)


_UNREADABLE = (
    *(OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError),
)
"""The errors that PyTorch raises over files that are damaged, cut short or something else."""


def read_progress(folder: Path) -> tuple[dict[str, Any], RandomState]:
    """Read what `StepLoop.save` wrote, but for DeepSpeed's part. Raises RunError for damage or another kind."""
    process = dist.get_rank() if dist.is_initialized() else 0
    try:
        progress, random = (
            torch.load(folder / name, map_location="cpu", weights_only=True)
            for name in (_PROGRESS_FILE, f"random-{process}.pt")
        )
        return dict(progress), RandomState.of_plain(random)
    except _UNREADABLE as error:
        raise RunError(f"{folder}: not a checkpoint of this version and recipe: {error}") from error
