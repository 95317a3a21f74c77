"""What is asked of the sites of a finished run, and what came of it: files in the run's folder, by the data set's name.

`evaluations/NAME/wanted.json` is a request that is not answered yet; `results.json` are the figures. Whoever answers a
request, or finds that it cannot be, removes it. Reads and writes files; knows no processes.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from core_training.foundation.bounded_reading import first_error, parse_json
from core_training.foundation.durable import commit_file, commit_json
from core_training.foundation.errors import InputError
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from strategies.messages import SITE_NAME, SumsOrder

_log = logging.getLogger(__name__)

FOLDER = "evaluations"
RESULTS = "results.json"
_WANTED = "wanted.json"


class Request(BaseModel):
    """What is to be judged: the result on the sites' data sets of a name. The rest is as in `SumsOrder`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    metrics: list[Annotated[str, Field(max_length=100)]]
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=64)] = []
    resamples: Annotated[int, Field(ge=0, le=2000)] = 500
    max_tokens: Annotated[int, Field(ge=1, le=4096)] = 256

    @classmethod
    def of(cls, **asked: Any) -> Self:
        """The request; raises InputError, naming the key, for what no site would be asked."""
        try:
            return cls.model_validate(asked)
        except ValidationError as error:
            raise InputError(first_error(error)) from None

    def order(self, run_id: str, state_digest: str, sites: int) -> SumsOrder:
        return SumsOrder(run_id=run_id, state_digest=state_digest, sites=sites, **self.model_dump())


def folder_of(run: Path, data: str) -> Path:
    """Where a request and its results lie. Raises InputError for a name that no data set of a request has."""
    if not re.fullmatch(SITE_NAME, data):
        raise InputError(
            f"--on {data}: it is a data set's name in the sites' site.yaml, or held-out: letters, digits, '.', '_', '-'"
        )
    return run / FOLDER / data


def ask_for(run: Path, request: Request) -> Path:
    """Note a request; figures of an earlier one stay until there are others. Returns its folder."""
    folder = folder_of(run, request.data)
    commit_file(folder / _WANTED, request.model_dump_json().encode())
    return folder


def pending(run: Path) -> list[Request]:
    """The requests that are not answered yet, by name."""
    return [request for path in sorted((run / FOLDER).glob(f"*/{_WANTED}")) if (request := _read(path)) is not None]


def _read(path: Path) -> Request | None:
    """A request; None, which is said, for one that is damaged or of another version: the others go on."""
    try:
        return Request.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        said = first_error(error) if isinstance(error, ValidationError) else error
        _log.warning("%s is no request that can be read (%s): it is left out", path, said)
        return None


def is_pending(run: Path, data: str) -> bool:
    return (folder_of(run, data) / _WANTED).exists()


def answer(run: Path, request: Request, document: dict[str, Any]) -> None:
    """Write the figures, and remove the request."""
    folder = folder_of(run, request.data)
    commit_json(folder / RESULTS, document)
    (folder / _WANTED).unlink(missing_ok=True)


def give_up(run: Path, request: Request, reason: str) -> None:
    """Tell why a request cannot be answered, and remove it."""
    RunFolder(run).event(events.EvaluationFailed(data=request.data, reason=reason))
    (folder_of(run, request.data) / _WANTED).unlink(missing_ok=True)


def results(run: Path, request: Request) -> dict[str, Any] | None:
    """The figures that answer a request; None where there are none, or another's."""
    try:
        document: dict[str, Any] = parse_json((folder_of(run, request.data) / RESULTS).read_bytes())
    except FileNotFoundError:
        return None
    return document if document["request"] == request.model_dump() else None


def forget_all(run: Path) -> None:
    """Remove all requests and figures: of a run that is taken back and will have another result."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)
