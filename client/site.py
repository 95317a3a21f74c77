"""A site's part in a run: answers the orders to join, train and evaluate, with one Trainable it keeps.

Knows nothing of Flower, sockets or other sites. What makes a killed run go on is here: each round's end is
checkpointed under the round's number. An order for a round that was trained already, because its sender fell back to
its last commit, is answered with the same bytes; after a restart the engine is restored to where the order needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from client.enrolment import Enrolment
from client.own_model import tune_own_model
from client.releases import Releases
from client.result_judge import RESULT, Judging, ResultJudge
from client.secure_side import SecureSide
from client.update_writer import TrainedSlice, UpdateWriter
from core_training import __version__
from core_training.engine.failures import explained
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import (
    DivergedError,
    FedloomError,
    InputError,
    NarrowScaleError,
    ProtocolError,
    RunError,
)
from core_training.foundation.state import Manifest, TrainableState
from core_training.foundation.trainable import (
    EVAL_REPORT,
    NOTHING_EVALUATED,
    TRAIN_REPORT,
    EvalReport,
    Trainable,
    TrainReport,
    holding,
    total,
)
from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger
from core_training.recipe.reading import load_recipe, parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.checkpoints import KEPT_CHECKPOINTS, prune_checkpoints, read_checkpoint, remove_later
from core_training.runs.result_format import result_name
from core_training.runs.run_folder import RunFolder
from strategies.adapter_sharing import keeps_own, trained_part, with_own
from strategies.group_gate import Ballot
from strategies.messages import (
    Envelope,
    EvaluateOrder,
    EvaluateReply,
    InitialStateOrder,
    InitialStateReply,
    JoinOrder,
    JoinReply,
    MaskedUpdate,
    MaskedVote,
    Refusal,
    SecureOrder,
    SumsOrder,
    TrainOrder,
    Update,
    Vote,
    VoteOrder,
)

SECRETS = "secure-aggregation.json"
_ASTRAY = -1


class SiteService:
    """A site's answers to orders, one by one, for the latest run it was to join."""

    def __init__(
        self,
        name: str,
        open_trainable: Callable[[Recipe], Trainable],
        folder: Path,
        enrolment: Enrolment,
        tell: Callable[[FedloomError], str] = str,
        processes: int = 1,
        judging: Judging | None = None,
    ) -> None:
        """`open_trainable` builds the engine a recipe asks for, or raises InputError; `folder` keeps the runs.

        `enrolment` is what the site brings to secure aggregation, and what it demands of it. `tell` is what others are
        told of an error met while training, which may speak of the site's files and records. `processes` is how many
        the site trains in, `judging` what it brings to evaluations of results.
        """
        self.name = name
        self._open_trainable = open_trainable
        self._enrolment = enrolment
        self._tell = tell
        self._processes = processes
        self._judging = judging or Judging()
        self._folder = folder
        self._run: _SiteRun | None = None

    def handle(self, order: Envelope) -> Envelope:
        """The answer to an order: what it asks for, or a Refusal that says why not."""
        arrived = time.monotonic()
        try:
            if order.kind == JoinOrder.kind:
                return self._join(JoinOrder.open(order)).envelope()
            if order.kind == TrainOrder.kind:
                train = TrainOrder.open(order)
                run = self._run_of(train.run_id)
                with explained(f"round {train.round}", run.recipe):
                    return run.train(train, arrived).envelope()
            if order.kind == VoteOrder.kind:
                vote = VoteOrder.open(order)
                run = self._run_of(vote.run_id)
                with explained(f"the vote of round {vote.round}", run.recipe):
                    return run.vote(vote).envelope()
            if order.kind == EvaluateOrder.kind:
                evaluate = EvaluateOrder.open(order)
                run = self._run_of(evaluate.run_id)
                with explained(f"the evaluation of round {evaluate.round}", run.recipe):
                    return run.evaluate(evaluate).envelope()
            if order.kind == SumsOrder.kind:
                sums = SumsOrder.open(order)
                return self._judge_of(sums.run_id).answer(sums).envelope()
            if order.kind == SecureOrder.kind:
                secure = SecureOrder.open(order)
                if secure.evaluation is not None:
                    return self._judge_of(secure.run_id).secure(secure).envelope()
                return self._run_of(secure.run_id).secure_side.answer(secure).envelope()
            if order.kind == InitialStateOrder.kind:
                return self._run_of(InitialStateOrder.open(order).run_id).send_initial_state().envelope()
            raise ProtocolError(f"unknown order '{order.kind}'")
        except FedloomError as error:
            if isinstance(error, RunError) and error.process_is_lost:
                raise
            # What is said of joining and judging was made to be told.
            is_public = order.kind in (JoinOrder.kind, SumsOrder.kind)
            return self._refusal(error, str(error) if is_public else self._tell(error))

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    def _judge_of(self, run_id: str) -> ResultJudge:
        def make_room() -> None:
            if self._run is not None and self._run.run_id == run_id:
                self.close()  # the run is over, and its result is loaded from the disk

        return ResultJudge(self.name, self._enrolment, self._judging, RunFolder(self._folder / run_id), make_room)

    def _join(self, order: JoinOrder) -> JoinReply:
        if order.version != __version__:
            raise InputError(
                f"this site runs fedloom {__version__}, the server {order.version}: install the same version"
            )
        run = self._run
        earlier = self._folder / order.run_id
        remembered = earlier / "recipe.yaml"
        if (earlier / SECRETS).exists() and not (
            remembered.exists() and load_recipe(remembered) == parse_recipe(order.recipe, source="the run's recipe")
        ):
            # Under another recipe what was masked could be asked for again, or an update be told from the others'.
            raise InputError(f"run {order.run_id} aggregates securely, and this site joined it with another recipe")
        if run is None or run.run_id != order.run_id or run.recipe_text != order.recipe:
            self.close()
            run = self._open(order.run_id, order.recipe)
            run.folder.keep_recipe(order.recipe)
        return run.offer(self._processes)

    def _open(self, run_id: str, recipe_text: str) -> _SiteRun:
        recipe = parse_recipe(recipe_text, source="the run's recipe")
        folder = RunFolder(self._folder / run_id)
        self._enrolment.check(recipe)
        secure_side = None
        if recipe.privacy.secure and recipe.topology.kind == "federated":
            secure_side = SecureSide(self.name, self._enrolment, recipe, run_id, folder.path / SECRETS)
        engine = self._open_trainable(recipe)
        rounding_secret = self._enrolment.rounding_secret
        records = engine.data_report.train_examples
        writer = UpdateWriter(
            recipe, recipe_text, engine.initial_digest, rounding_secret, secure_side, records, self.name
        )
        ledger = self._enrolment.ledger or PrivacyLedger(self._folder / LEDGER_FILE)
        try:
            releases = Releases.of(recipe, engine.data_report.units, run_id, ledger)
        except FedloomError:
            engine.close()
            raise
        self._run = _SiteRun(run_id, recipe_text, recipe, engine, folder, writer, self.name, releases)
        return self._run

    def _run_of(self, run_id: str) -> _SiteRun:
        """The run's engine, built again after a restart from what the order to join said."""
        if self._run is not None and self._run.run_id == run_id:
            return self._run
        remembered = self._folder / run_id / "recipe.yaml"
        if not remembered.exists():
            raise ProtocolError(f"this site has not joined run {run_id}")
        self.close()
        try:
            return self._open(run_id, remembered.read_text(encoding="utf-8"))
        except InputError as error:
            # What others may be told, as when the run was joined; an error met while training is another matter.
            raise ProtocolError(str(error)) from error

    def _refusal(self, error: FedloomError, reason: str) -> Envelope:
        """Give the reason, without telling where on this machine anything lies."""
        reason = reason.replace(f"{self._folder.absolute()}/", "").replace(f"{self._folder}/", "")
        return Refusal(
            reason=reason, fatal=isinstance(error, InputError), too_narrow=isinstance(error, NarrowScaleError)
        ).envelope()


class _SiteRun:
    """One run at this site: its engine, and the round it stands at the end of."""

    def __init__(
        self,
        run_id: str,
        recipe_text: str,
        recipe: Recipe,
        engine: Trainable,
        folder: RunFolder,
        writer: UpdateWriter,
        name: str,
        releases: Releases,
    ) -> None:
        self.run_id = run_id
        self._releases = releases
        self._name = name
        self.recipe_text = recipe_text
        self.folder = folder
        self.recipe = recipe
        self._engine = engine
        self._writer = writer
        self._round = 0
        """At whose end the engine stands; `_ASTRAY` in the middle of one, where a failure may leave it."""
        self._counted = 0
        """The rounds after which the learning rate stands, were they all of the run that counted."""
        self._taken_in: int | None = None
        """What the order said that led to where the engine stands: see `_belongs`."""

    @property
    def manifest(self) -> Manifest:
        return self._engine.manifest

    @property
    def secure_side(self) -> SecureSide:
        """Raise ProtocolError for a run whose updates are not masked."""
        if self._writer.secure_side is None:
            raise ProtocolError(f"run {self.run_id} does not aggregate securely")
        return self._writer.secure_side

    def send_initial_state(self) -> InitialStateReply:
        return InitialStateReply(run_id=self.run_id, payload=self._engine.initial_state.to_bytes())

    def offer(self, processes: int) -> JoinReply:
        secure_side = self._writer.secure_side
        return JoinReply(
            run_id=self.run_id,
            version=__version__,
            recipe_digest=self.recipe.engine_digest,
            manifest=self.manifest.to_json(),
            initial_digest=self._engine.initial_digest,
            initial_state_digest=self._engine.initial_state.digest,
            roster_digest=secure_side.roster_digest if secure_side else None,
            data=self._releases.announced(self._engine.data_report),
            processes=processes,
            layout=self._engine.layout(base_name=self.recipe.model.name_or_path),
        )

    def train(self, order: TrainOrder, arrived: float) -> Update | MaskedUpdate:
        self._writer.check(order)
        incoming = self._incoming(order)
        start_digest = incoming.digest
        if (done := self._already_trained(order, incoming, start_digest, arrived)) is not None:
            return done
        self._releases.check(self._steps_of(order))
        self._stand_after(order.round - 1, order.taken_in)
        mine = self._with_own(incoming)
        missed = order.round - 1 - self._round
        left_out = self._was_left_out(order)
        self._round = _ASTRAY
        # Past the rounds that it missed, and back over one of its own that turned out to be void.
        self._engine.skip((order.counted - self._counted) * self._of_a_round)
        part = trained_part(self.recipe, self.manifest, order.round, self._name)
        self._engine.begin_round(mine, missed_rounds=missed > 0, left_out=left_out, part=part)
        waited = time.monotonic() - arrived
        try:
            report = self._engine.train(
                self._steps_of(order),
                on_figures=lambda figures: self.folder.event(events.StepsLogged.of(figures, order.round)),
            )
        except FedloomError:
            self._releases.charge_failure(order, self._steps_of(order))
            raise
        evaluation = None
        if self._evaluates(order):
            # After training, so that nothing delays it; the losses are those of the state that came in.
            with holding(self._engine, mine) as trained:
                evaluation = self._evaluation()
        else:
            trained = self._engine.read_state()
        # Before the checkpoint: what is in it, as moments of an optimizer, goes on into later rounds.
        sent = self._sent(incoming, trained)
        self._releases.charge(order, sent, self._steps_of(order))
        notes = {
            "incoming": start_digest,
            "steps": order.steps,
            "void_rounds": order.void_rounds,
            "taken_in": order.taken_in,
            "train": asdict(report),
            "evaluation": asdict(evaluation) if evaluation is not None else None,
        }
        # A server that was taken back to an earlier round: what came after that is no part of the run any more. First
        # of all, as this round's number would vouch for those that it counted before.
        remove_later(self.folder.checkpoints, "round-*", self._checkpoint(order.round).name)
        self._engine.checkpoint(self._checkpoint(order.round), notes)
        # What is the site's own cannot be had of anybody after a server was taken back to an earlier round.
        has_own = keeps_own(self.recipe) or self.recipe.aggregation.counts_rounds
        keep = self.recipe.topology.keep_rounds if has_own else KEPT_CHECKPOINTS
        prune_checkpoints(self.folder.checkpoints, "round-*", keep)
        self._round, self._counted, self._taken_in = order.round, order.counted + 1, order.taken_in
        eval_loss = evaluation.loss if evaluation else None
        self.folder.event(events.SliceTrained(round=order.round, loss=report.loss_mean, eval_loss=eval_loss))
        trained_slice = self._slice(incoming, sent, report, evaluation, start_digest)
        return self._writer.write(order, trained_slice, arrived, waited)

    def vote(self, order: VoteOrder) -> Vote | MaskedVote:
        """Try the means of a round's groups, of one of which this site's update is a part."""
        self._writer.check_vote(order)
        folder = self._checkpoint(order.round)
        if not folder.exists():
            raise ProtocolError(f"this site has not trained in round {order.round}")
        self._stand_after(order.round)
        notes = read_checkpoint(folder, self.manifest)[1]
        if notes["evaluation"] is None:
            raise ProtocolError(f"the state that round {order.round} began with was not evaluated here")
        start = EVAL_REPORT.validate_python(notes["evaluation"])
        tried = [self._tried(state) for state in self._candidates(order)]
        return self._writer.vote(order, Ballot.of(self.recipe, start, tried))

    def _candidates(self, order: VoteOrder) -> Iterator[TrainableState]:
        self._check_manifest(order)
        length, rest = divmod(len(order.payload), order.candidates)
        if rest or not length:
            raise ProtocolError(f"{len(order.payload)} bytes are no {order.candidates} states of one length")
        for first in range(0, len(order.payload), length):
            yield TrainableState.from_bytes(order.payload[first : first + length], self.manifest)

    def _tried(self, state: TrainableState) -> EvalReport | None:
        """The evaluation of a state; None where its loss is no finite number."""
        own = self._engine.read_state()
        self._engine.write_state(self._with_own(state))
        try:
            return total(self._engine.evaluate()) if state.is_finite() else None
        except DivergedError:
            return None
        finally:
            self._engine.write_state(own)

    def evaluate(self, order: EvaluateOrder) -> EvaluateReply:
        state = self._incoming(order)
        common = state.digest
        if self._writer.secure_side is not None:
            self._writer.secure_side.admit_evaluation(common, final=order.final)
        if keeps_own(self.recipe):
            self._stand_after(order.round, order.taken_in)
            state = self._with_own(state)
        with holding(self._engine, state):
            evaluation = self._evaluation() or NOTHING_EVALUATED
            if order.final:
                self._engine.save_model(self.folder.path / result_name(self.recipe))
                commit_file(self.folder.path / RESULT, common.encode())
                self.folder.event(events.RoundsCompleted(round=order.round, eval_loss=evaluation.loss))
        if order.final:
            tune_own_model(self._engine, self.recipe, state, evaluation, self.folder)
        told = evaluation if self._releases.tell_losses else NOTHING_EVALUATED
        return EvaluateReply(run_id=self.run_id, round=order.round, evaluation=told)

    def close(self) -> None:
        self._engine.close()

    def _incoming(self, order: TrainOrder | EvaluateOrder) -> TrainableState:
        """The state an order brings, or this site's initial state where it brings none."""
        self._check_manifest(order)
        state = TrainableState.from_bytes(order.payload, self.manifest) if order.payload else self._engine.initial_state
        if not state.is_finite():
            raise ProtocolError("the state that was sent holds NaN or infinite values")
        return state

    def _check_manifest(self, order: TrainOrder | VoteOrder | EvaluateOrder) -> None:
        if order.manifest_digest != self.manifest.digest:
            raise ProtocolError("the order's manifest differs from this site's: another base model or another recipe")

    def _already_trained(
        self, order: TrainOrder, incoming: TrainableState, start_digest: str, arrived: float
    ) -> Update | MaskedUpdate | None:
        """The answer given before, when this very order was carried out and is asked for again."""
        folder = self._checkpoint(order.round)
        if not folder.exists():
            return None
        trained, notes = read_checkpoint(folder, self.manifest)
        if notes["incoming"] != start_digest or notes["steps"] != order.steps:
            return None
        if notes.get("void_rounds", 0) != order.void_rounds:
            return None
        if self._evaluates(order) and notes["evaluation"] is None:
            return None
        evaluated = notes["evaluation"] is not None and self._evaluates(order)
        evaluation = EVAL_REPORT.validate_python(notes["evaluation"]) if evaluated else None
        report = TRAIN_REPORT.validate_python(notes["train"])
        sent = self._sent(incoming, trained)
        self._releases.charge(order, sent, self._steps_of(order))
        trained_slice = self._slice(incoming, sent, report, evaluation, start_digest)
        return self._writer.write(order, trained_slice, arrived, resident_seconds=0.0)

    def _was_left_out(self, order: TrainOrder) -> bool:
        """Whether no mean has what this site trained last.

        Raises ProtocolError where one has what the site lost, so that its memory would not fit the server's any more.
        """
        if order.taken_in is None or not self.recipe.aggregation.counts_rounds:
            return False
        if self._round < order.taken_in:
            raise ProtocolError(
                f"this site does not have what it trained in round {order.taken_in} any more, which "
                f"aggregation.outer.step {self.recipe.aggregation.outer.step} counts; bring back its folder of the run "
                "from a copy, or go on without it"
            )
        return self._round > order.taken_in

    @property
    def _of_a_round(self) -> int:
        """The steps of a round at this site."""
        return self._engine.total_steps // (self.recipe.topology.rounds or 1)

    def _steps_of(self, order: TrainOrder) -> int:
        """The steps that an order is for, at most."""
        return order.steps or self._of_a_round

    def _evaluates(self, order: TrainOrder) -> bool:
        return order.evaluate and self.recipe.topology.judges(self._name)

    def _slice(
        self,
        start: TrainableState,
        sent: TrainableState,
        report: TrainReport,
        evaluation: EvalReport | None,
        start_digest: str,
    ) -> TrainedSlice:
        """The slice as others may know it; `sent` is on the site's account."""
        if self._releases.tell_losses:
            return TrainedSlice(start, sent, report, evaluation, start_digest)
        return TrainedSlice(start, sent, report.withheld, None, start_digest)

    def _sent(self, start: TrainableState, trained: TrainableState) -> TrainableState:
        """The trained state as others may know it."""
        return with_own(self.recipe, trained, own=start) if keeps_own(self.recipe) else trained

    def _evaluation(self) -> EvalReport | None:
        """The held-out loss of what the engine holds; None where it is no number, if nobody is to know."""
        try:
            return total(self._engine.evaluate())
        except DivergedError:
            if self._releases.tell_losses:
                raise
            return None

    def _with_own(self, common: TrainableState) -> TrainableState:
        """The common state with what is this site's own, as the engine holds it."""
        return with_own(self.recipe, common, self._engine.read_state()) if keeps_own(self.recipe) else common

    def _stand_after(self, round_number: int, taken_in: int | None = None) -> None:
        """Bring the engine to the end of a round (0: the start), or to the newest round before it that is kept.

        `taken_in`: the last of this site's rounds that counted, where nothing may come back of rounds that do not
        belong to the run any more.
        """
        if self._round == round_number and self._belongs(self._round, self._taken_in, taken_in):
            return
        before, self._round = self._round, _ASTRAY  # until it is known to stand somewhere
        if (newest := self._newest_kept(round_number, taken_in)) is not None:
            notes = self._engine.restore(newest)
            self._round, self._taken_in = _round_of(newest), notes.get("taken_in")
            self._counted = self._round - notes.get("void_rounds", 0)
        else:
            if before != 0:
                self._engine.reset()
            self._round, self._counted, self._taken_in = 0, 0, None
        if self._round != round_number:
            self.folder.event(events.CaughtUp(round=round_number, engine_round=self._round))

    def _newest_kept(self, round_number: int, taken_in: int | None) -> Path | None:
        """The newest checkpoint of a round until this one that belongs to the run."""
        for folder in sorted(self.folder.checkpoints.glob("round-*"), reverse=True):
            number = _round_of(folder)
            if number > round_number:
                continue
            if taken_in is None or number <= taken_in:
                return folder
            if self._belongs(number, read_checkpoint(folder, self.manifest)[1].get("taken_in"), taken_in):
                return folder
        return None

    @staticmethod
    def _belongs(number: int, noted: int | None, taken_in: int | None) -> bool:
        """Whether what this site remembers of a round is of the run, though its server may have been taken back.

        It is for a round until the last that counted, `taken_in`, as later ones go with each training. One after that
        was lost, and then it began with the same that counts now (`noted`), or it was taken back.
        """
        return taken_in is None or number <= taken_in or noted == taken_in

    def _checkpoint(self, round_number: int) -> Path:
        return self.folder.checkpoints / f"round-{round_number:06d}"


def _round_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("round-"))
