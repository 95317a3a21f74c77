"""The site's resident worker: loads the base model once and carries out every order that comes over its socket.

`python -m client.worker SITE_FOLDER`; under torchrun, rank 0 speaks and the others follow. Knows no network: orders
come from the SuperNode, or from the gossip node, of this machine and this user.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from client import worker_socket
from client.enrolment import load_enrolment
from client.site_config import SiteConfig, load_site_config
from core_training.distributed.launch import must_launch, run_as_group
from core_training.foundation.careful_logging import log_to_stdout
from core_training.foundation.errors import FedloomError, InputError, ProtocolError, RunError
from core_training.foundation.hub_models import hub_model
from core_training.foundation.trainable import Trainable
from core_training.models.libraries import own_the_process, settle_libraries
from core_training.recipe.model_source import on_this_machine
from core_training.recipe.refused_key import refused_key
from core_training.recipe.schema import Recipe
from strategies.messages import Envelope, Refusal

HANDED_OVER_WITHIN = 60.0
"""Seconds that the other side may take to send its order, or to take its answer."""

_ROUND = re.compile(r'"round": ?(\d+)')

_log = logging.getLogger(__name__)


def serve(listener: socket.socket, handle: Callable[[Envelope], Envelope], max_message_bytes: int) -> None:
    """Answer one order after the other, for ever.

    A malformed order gets a Refusal. An unexpected exception gets one too, and then ends the worker: its successor
    starts from what was committed.
    """
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(HANDED_OVER_WITHIN)
            try:
                _answer(connection, handle, max_message_bytes)
            except OSError as error:
                _log.warning("whoever gave the order left: %s", error)
            except MemoryError:
                _log.error("out of memory while an order or its answer was handed over")


def _answer(connection: socket.socket, handle: Callable[[Envelope], Envelope], max_message_bytes: int) -> None:
    try:
        order = worker_socket.receive(connection, max_message_bytes)
    except ProtocolError as error:
        worker_socket.send(connection, Refusal(reason=str(error)).envelope())
        return
    started = time.monotonic()
    try:
        reply = handle(order)
    except FedloomError as error:
        reply = Refusal(reason=str(error)).envelope()
        if isinstance(error, RunError) and error.process_is_lost:
            _log.error("%s; the worker starts anew", error, exc_info=error.__cause__)
            told = error.public or "the site's worker could not go on; its log says more"
            worker_socket.send(connection, Refusal(reason=told).envelope())
            raise SystemExit(1) from error
    except Exception as error:
        _log.exception("%s failed unexpectedly", order.kind)
        reason = f"the site's worker failed unexpectedly: {type(error).__name__}; its log says more"
        worker_socket.send(connection, Refusal(reason=reason).envelope())
        raise SystemExit(1) from error
    seconds = time.monotonic() - started
    number = _ROUND.search(order.text[:1000])  # of a long text, which was parsed already
    _log.info("%s %s: %s after %.2f s", order.kind, number[1] if number else "", reply.kind, seconds)
    worker_socket.send(connection, reply)


class Worker:
    """The site's service, with the engine that `site.yaml` asks for."""

    def __init__(self, folder: Path, config: SiteConfig) -> None:
        from client.result_judge import Judging, JudgingTerms
        from client.site import SiteService

        self._config = config
        self._group_is_used = False
        enrolment = load_enrolment(folder, config)
        self.service = SiteService(
            config.name,
            self._open_trainable,
            folder / "runs",
            enrolment,
            self._keep_to_itself,
            config.deepspeed.processes,
            Judging(
                {name: [files] if isinstance(files, str) else files for name, files in config.data.items()},
                JudgingTerms(**config.evaluation.model_dump()),
                self._resolved,
                self._keep_to_itself,
            ),
        )

    def _open_trainable(self, recipe: Recipe) -> Trainable:
        resolved = self._config.resolve(recipe)
        try:
            return self._open(resolved)
        except RunError as error:  # another time it may work
            told = self._keep_to_itself(error)
            raise RunError(told, public=told, process_is_lost=error.process_is_lost) from error
        except FedloomError as error:
            raise InputError(self._keep_to_itself(error, refused_key(str(error), resolved))) from error

    def _resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with what is on this machine in the place of names, for judging."""
        settle_libraries()
        resolved = self._config.resolve(recipe)
        try:
            return on_this_machine(resolved)
        except FedloomError as error:
            raise InputError(self._keep_to_itself(error)) from error

    def _keep_to_itself(self, error: FedloomError, key: str | None = None) -> str:
        """Log an error of this site's files and records; return what the giver of the order may read.

        That is the recipe's key that it is about, where one is known, and no more.
        """
        _log.error("order refused: %s", error, exc_info=error.__cause__)
        if error.public is not None:
            return error.public
        about = f" ({key})" if key is not None else ""
        return (
            f"site '{self._config.name}' could not work with its model, data or reward function{about}; "
            "its own logs/worker.log says why"
        )

    def _open(self, asked: Recipe) -> Trainable:
        # In a group this is the one process that fetches: the others follow.
        resolved = on_this_machine(asked)
        if hub_model(resolved.model.name_or_path) is not None:
            _log.info("the base model is %s, its weights %s", resolved.model.name_or_path, resolved.model.digest)
        if not self._config.deepspeed.used:
            settle_libraries()
            from core_training.engine.engine import open_engine

            return open_engine(resolved)
        from core_training.distributed.group import lead_or_follow

        if self._group_is_used:
            # DeepSpeed changes its processes for good. The order is given to the group that takes this one's place.
            raise SystemExit("another run begins: the group starts afresh")
        self._group_is_used = True
        return lead_or_follow(resolved)


def main() -> None:
    """Run the worker of the site folder given on the command line."""
    log_to_stdout()
    own_the_process()
    folder = Path(sys.argv[1]).absolute()
    os.chdir(folder)
    config = load_site_config(folder)
    if must_launch(config.deepspeed):
        sys.exit(run_as_group(config.deepspeed.processes, "client.worker", [str(folder)]))
    if config.deepspeed.used:
        from core_training.distributed.group import join_or_follow

        join_or_follow()
    worker = Worker(folder, config)
    with worker_socket.listen(folder) as listener:
        _log.info("the worker of %s is ready", config.name)
        serve(listener, worker.service.handle, config.max_message_bytes)


if __name__ == "__main__":
    try:
        main()
    except FedloomError as error:
        _log.error("the worker cannot start: %s", error)
        sys.exit(error.exit_code)
