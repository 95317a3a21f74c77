"""A site's account of what it has released about its units, over all its runs: a line for each slice of training.

A line is on the disk before what it speaks of leaves, so whatever is killed, nothing left that is not in it. A release
that is asked for again, in the same bytes, is in it once. Knows nothing of training.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core_training.foundation.bounded_reading import first_error, shortened_text
from core_training.foundation.errors import InputError, RunError
from core_training.privacy.accounting import Release, epsilon_of

LEDGER_FILE = "privacy-ledger.jsonl"

_LONGEST_LINE = 4096


class LedgerLine(BaseModel):
    """One release: the run and its round (central: its step), a digest of what left, and by what mechanism."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    run: Annotated[str, Field(min_length=1, max_length=200)]
    at: Annotated[int, Field(ge=0)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    unit: Annotated[str, Field(min_length=1, max_length=200)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    noise_multiplier: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)]

    @property
    def release(self) -> Release:
        return Release(self.unit, self.sampling_rate, self.noise_multiplier, self.steps)


@dataclass(frozen=True)
class Budget:
    """The most that all releases about units of one kind may come to."""

    unit: str
    epsilon: float
    delta: float


class BudgetSpentError(InputError):
    """A release would lead beyond the budget, which others may be told."""

    def __init__(self, message: str) -> None:
        super().__init__(message, public=message)


class PrivacyLedger:
    """The account in one file, with the budget that holds for it, if any."""

    def __init__(self, path: Path, budget: Budget | None = None) -> None:
        self.path = path
        self.budget = budget

    def lines(self) -> list[LedgerLine]:
        """All lines, oldest first. Raises RunError where the file cannot be read or is damaged: what was spent is not
        known then.
        """
        try:
            with self._opened() as file:
                return self._read(file)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.path} cannot be read ({error}); what was released is not known") from error

    def check(self, release: Release, but_for: str | None = None) -> None:
        """Raise BudgetSpentError where `release`, after all that is in the ledger, would lead beyond the budget.

        What the run `but_for` has released does not count: `release` is all of that run.
        """
        if self.budget is not None:
            self._check([line for line in self.lines() if line.run != but_for], release)

    def charge(self, run: str, at: int, digest: str, release: Release) -> None:
        """Write a release down, unless this very one is there already; on the disk when this returns.

        `digest` (hex) is of what leaves. Raises BudgetSpentError, writing nothing, and RunError when the disk refuses.
        """
        line = LedgerLine(
            run=run,
            at=at,
            digest=digest,
            unit=release.unit,
            sampling_rate=release.sampling_rate,
            noise_multiplier=release.noise_multiplier,
            steps=release.steps,
        )
        try:
            with self._opened(create=True) as file:
                lines = self._read(file)
                if any((line.run, line.digest) == (one.run, one.digest) for one in lines):
                    return
                self._check(lines, release)
                file.write(line.model_dump_json().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"{self.path} could not be written ({error}), so nothing is released") from error

    def _check(self, lines: Sequence[LedgerLine], release: Release) -> None:
        budget = self.budget
        if budget is None:
            return
        if release.unit != budget.unit:
            raise BudgetSpentError(
                f"privacy.differential_privacy.unit: this site's budget is for each {budget.unit}, and the recipe "
                f"protects each {release.unit}; set it to {budget.unit}"
            )
        spent = [line.release for line in lines if line.unit == budget.unit]
        if (epsilon := epsilon_of([*spent, release], budget.delta)) > budget.epsilon:
            raise BudgetSpentError(
                f"privacy.differential_privacy: {release.steps} more steps would bring this site to ε "
                f"{epsilon:.3g} at δ {budget.delta:g}; its budget is {budget.epsilon:g} (privacy in its site.yaml), of "
                f"which {epsilon_of(spent, budget.delta):.3g} is spent; take more noise or fewer steps"
            )

    @contextmanager
    def _opened(self, *, create: bool = False) -> Iterator[BinaryIO]:
        """The file, which nobody else has meanwhile; 0600 where it is new."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        with os.fdopen(os.open(self.path, flags, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _read(self, file: BinaryIO) -> list[LedgerLine]:
        """All whole lines. One that a kill cut off is removed: what it speaks of had not left."""
        file.seek(0)
        lines: list[LedgerLine] = []
        end = 0
        while text := file.readline(_LONGEST_LINE):
            if not text.endswith(b"\n"):
                if len(text) == _LONGEST_LINE or file.read(1):
                    raise self._damaged(len(lines), "it is too long")
                file.truncate(end)
                break
            try:
                lines.append(LedgerLine.model_validate_json(text))
            except ValidationError as error:
                raise self._damaged(len(lines), shortened_text(first_error(error))) from None
            end += len(text)
        return lines

    def _damaged(self, before: int, why: str) -> RunError:
        return RunError(
            f"{self.path}, line {before + 1}: {why}; what this site has released is not known, so it releases nothing "
            "more: put the file back as it was"
        )
