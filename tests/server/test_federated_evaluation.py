"""Federated evaluation in process: six sites judge a run's result, and the sums say what one judge of all would."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from client.result_judge import Judging, JudgingTerms
from client.site import SiteService
from core_training.foundation.durable import commit_file
from core_training.foundation.errors import InputError, ProtocolError, RunError
from core_training.foundation.trainable import Trainable
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe
from core_training.runs import events
from core_training.runs.run_folder import RunFolder
from evaluation.federated.site_sums import Plan, is_possible
from evaluation.items import Task
from evaluation.running import Settings, evaluate
from evaluation.tasks.formats import Reading, read_items
from flower_transport.in_process import InProcessGrid
from server.evaluation_requests import Request, ask_for, is_pending, pending, results
from server.federated_evaluation import evaluate_pending
from server.membership import Participants
from simulations.enrolment import enrolments_of, identities_of
from strategies.messages import Envelope
from tests import tiny
from tests.evaluation.conftest import pubmedqa
from tests.failing_sites import Fault, federate

pytestmark = pytest.mark.slow
NAMES = [f"s{number}" for number in range(6)]
LOSS = ["loss", "perplexity", "token_accuracy"]
CHOICES = ["accuracy", "macro_f1", "ece", "ties"]
LABELS = ["yes", "no", "maybe"]
MASKED = {"secure_aggregation": {"threshold": 0.55, "minimum_sites": 3}}


def nobody(site: str, order: Envelope) -> None:
    return None


def no_engine(recipe: Recipe) -> Trainable:
    raise AssertionError("a result is judged without an engine")


@dataclass
class Sites:
    """A finished simulated run, and its sites' data sets by site and name."""

    folder: Path
    data: dict[str, dict[str, list[str]]]
    terms: dict[str, JudgingTerms] = field(default_factory=dict)
    asked: list[tuple[str, Envelope, Envelope]] = field(default_factory=list)

    def services(self) -> dict[str, SiteService]:
        enrolments = enrolments_of(NAMES, "federated")
        return {
            name: SiteService(
                name,
                no_engine,
                self.folder / "sites" / name,
                enrolments[name],
                judging=Judging(
                    self.data[name],
                    self.terms.get(name, JudgingTerms(least_items=2)),
                    tell=lambda error: error.public or "an error of its own",
                ),
            )
            for name in NAMES
        }

    def ask(self, request: Request, fault: Fault = nobody) -> dict[str, Any] | None:
        """The figures that the sites give, or None where they fail."""
        nodes, services = dict(enumerate(NAMES, start=1)), self.services()

        def handle(order: Envelope, node: int) -> Envelope:
            when = fault(nodes[node], order)
            if when == "before":
                raise ProtocolError(f"{nodes[node]} is gone")
            answer = services[nodes[node]].handle(order)
            self.asked.append((nodes[node], order, answer))
            if when == "after":
                raise ProtocolError(f"the answer of {nodes[node]} is lost")
            return answer

        ask_for(self.folder, request)
        return self.go_on(InProcessGrid(handle, nodes), request)

    def go_on(self, grid: InProcessGrid, request: Request) -> dict[str, Any] | None:
        nodes = dict(enumerate(NAMES, start=1))
        participants = Participants(lambda: nodes, lambda _: identities_of(NAMES), in_process=True)
        evaluate_pending(grid, RunFolder(self.folder), participants)
        assert not is_pending(self.folder, request.data)
        found = results(self.folder, request)
        return None if found is None else found["results"][0]

    def reason(self) -> str:
        return list(RunFolder(self.folder).events(events.EvaluationFailed))[-1].reason


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """Each site's data sets: records with an answer, and questions with choices; of unequal numbers."""
    folder, found = tmp_path_factory.mktemp("judged"), {}
    for number, name in enumerate(NAMES):
        own = tiny.write_jsonl(folder / f"{name}-test.jsonl", tiny.questions(10 + number, 5 + 3 * number))
        choices = folder / f"{name}-choices.json"
        items = {f"{name}-{key}": value for key, value in pubmedqa(6 + 2 * number).items()}
        choices.write_text(json.dumps(items), encoding="utf-8")
        found[name] = {"test": [str(own)], "choices": [str(choices)]}
    return found


@pytest.fixture(scope="module")
def make_run(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any], dict[str, Any]], Path]:
    """Carries out a run of six sites, which are trained a step."""
    files = tmp_path_factory.mktemp("trained")
    sites = [str(tiny.write_jsonl(files / f"{name}.jsonl", tiny.questions(n, 12 + n))) for n, name in enumerate(NAMES)]

    def make(privacy: dict[str, Any], topology: dict[str, Any]) -> Path:
        document = {
            "model": {"name_or_path": str(tiny_model)},
            "stage": "sft",
            "tuning": {"mode": "lora", "lora": {"r": 4, "lora_alpha": 8}},
            "data": {"train": "x", "columns": {"prompt": "question", "completion": "answer"}, "eval_fraction": 0.3},
            "training": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "max_length": 64},
            "simulation": {"sites": sites},
            "topology": {"kind": "federated", "rounds": 1, "local_steps": 1, **topology},
            "privacy": privacy,
        }
        folder = tmp_path_factory.mktemp("finished") / "run"
        federate(parse_recipe(json.dumps(document)), folder, nobody)
        return folder

    return make


@pytest.fixture(scope="module")
def plain_run(make_run: Callable[..., Path]) -> Path:
    return make_run({"codec": "ring16"}, {"minimum_sites": 2})


@pytest.fixture(scope="module")
def masked_run(make_run: Callable[..., Path]) -> Path:
    return make_run(MASKED, {})


def copied(run: Path, to: Path) -> Path:
    """A run that nobody was asked about."""
    return Path(shutil.copytree(run, to / "run"))


ASKED = Request(data="choices", metrics=[*CHOICES, "loss"], labels=LABELS, resamples=20)


@pytest.fixture(scope="module")
def judged(
    plain_run: Path,
    masked_run: Path,
    data: dict[str, dict[str, list[str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Both runs, whose sites have judged them on one data set and have told nobody yet; and what they then tell."""
    found = {}
    for name, run in (("plain", plain_run), ("masked", masked_run)):
        sites = Sites(copied(run, tmp_path_factory.mktemp(name)), data)
        document = sites.ask(ASKED)
        assert document is not None, sites.reason()
        shutil.rmtree(sites.folder / "evaluations")
        for masks in sites.folder.glob("sites/*/run/evaluations/*/masks.json"):
            masks.unlink()
        found[name] = (sites.folder, document)
    return found


def pooled(run: Path, data: Mapping[str, Mapping[str, list[str]]], name: str, metrics: list[str], folder: Path) -> Any:
    """What one judge of all sites' items finds."""
    files = [file for site in data.values() for file in site[name]]
    items = read_items(files, Reading(usual_columns={"prompt": "question", "completion": "answer"})).items
    settings = Settings(max_length=64, overlap=False)
    return evaluate([str(run)], [Task(name, items, tuple(metrics))], settings, folder).results[0].document


def test_the_sites_sums_are_the_figures_of_one_judge_of_all_records(
    plain_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    sites = Sites(copied(plain_run, tmp_path), data)
    for name, metrics, labels in (("test", LOSS, []), ("choices", CHOICES, LABELS)):
        found = sites.ask(Request(data=name, metrics=metrics, labels=labels))
        whole = pooled(plain_run, data, name, metrics, tmp_path / name)
        assert found is not None, sites.reason()
        assert found["n"] == whole["n"] > 0
        assert found["sites"] == NAMES
        for metric in metrics:
            assert found["metrics"][metric]["value"] == pytest.approx(
                whole["metrics"][metric]["value"], rel=1e-6, abs=1e-6
            )
            assert found["metrics"][metric]["n"] == whole["metrics"][metric]["n"]
    assert found["metrics"]["accuracy"]["value"] == whole["metrics"]["accuracy"]["value"]
    order = [whole["confusion"]["labels"].index(label) for label in LABELS]
    assert found["confusion"]["counts"] == [[whole["confusion"]["counts"][a][b] for b in order] for a in order]


def test_masks_change_no_bit_of_the_figures(judged: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """Intervals too: a site draws its resamples of its secret, the run and the question, which are alike here."""
    plain, masked = ({**judged[name][1]} for name in ("plain", "masked"))
    assert (plain.pop("masked"), masked.pop("masked")) == (False, True)
    assert plain == masked


def kinds_of(sites: Sites, site: str) -> list[str]:
    return [answer.kind for name, _, answer in sites.asked if name == site]


def test_under_masks_no_payload_in_the_clear_leaves_a_site(
    masked_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    terms = {name: JudgingTerms(least_items=2, tell_own_figures=True) for name in NAMES}
    sites = Sites(copied(masked_run, tmp_path), data, terms)
    document = sites.ask(Request(data="test", metrics=LOSS, resamples=10))
    assert document is not None, sites.reason()
    assert document["groups"] == {}, "what some tell, taken off the sum, tells of the others"
    for site, _, answer in sites.asked:
        if answer.kind == "summed":
            assert not answer.payload, site
            assert answer.fields["tells_own"] is False
    assert kinds_of(sites, "s0") == ["summed", "secured", "secured", "masked_sums", "secured"]


def at(step: str, *names: str, when: str = "before", times: int = 1000) -> Fault:
    left = dict.fromkeys(names, times)

    def fault(site: str, order: Envelope) -> str | None:
        masked = order.kind == "sums" and order.fields.get("masking") is not None
        hit = step in (order.fields.get("step"), "mask" if masked else order.kind)
        if not hit or not left.get(site):
            return None
        left[site] -= 1
        return when

    return fault


@pytest.mark.parametrize("step", ["mask", "unmask", "keys", "sums"])
def test_who_drops_out_of_a_masked_evaluation_is_missing_and_the_others_sum_is_exact(
    judged: dict[str, tuple[Path, dict[str, Any]]], data: dict[str, dict[str, list[str]]], tmp_path: Path, step: str
) -> None:
    sites = Sites(copied(judged["masked"][0], tmp_path / "masked"), data)
    document = sites.ask(ASKED, at(step, "s2"))
    assert document is not None, sites.reason()
    others = Sites(copied(judged["plain"][0], tmp_path / "plain"), data)
    plain = others.ask(ASKED, at("sums", *(["s2"] if step != "unmask" else [])))
    assert plain is not None
    assert document["n"] == plain["n"]
    assert {name: one["value"] for name, one in document["metrics"].items()} == {
        name: one["value"] for name, one in plain["metrics"].items()
    }
    assert list(document["missing"]) == ([] if step == "unmask" else ["s2"])


def test_too_few_for_the_minimum_open_no_sum_and_spend_none(
    judged: dict[str, tuple[Path, dict[str, Any]]], data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    sites = Sites(copied(judged["masked"][0], tmp_path), data)
    assert sites.ask(ASKED, at("mask", "s0", "s1", "s2")) is None
    assert "too few sent their masked sums, ask again for the same: 3 of 6 sites are there" in sites.reason()
    assert sites.ask(ASKED) == judged["masked"][1], "once they are back"


def test_a_lost_answer_is_asked_for_again_and_is_the_same(
    judged: dict[str, tuple[Path, dict[str, Any]]], data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    folder, whole = judged["masked"]
    sites = Sites(copied(folder, tmp_path), data)
    assert sites.ask(ASKED, at("mask", "s1", when="after", times=1)) == whole
    first, second = (answer for site, _, answer in sites.asked if (site, answer.kind) == ("s1", "masked_sums"))
    assert bytes(first.payload) == bytes(second.payload)


class Killed(Exception):
    """Ends the server where it stands."""


@pytest.mark.parametrize("step", ["sums", "shares", "mask", "unmask"])
def test_a_server_killed_anywhere_asks_again_and_has_the_same_figures(
    judged: dict[str, tuple[Path, dict[str, Any]]],
    data: dict[str, dict[str, list[str]]],
    tmp_path: Path,
    step: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, whole = judged["masked"]
    sites, met = Sites(copied(folder, tmp_path), data), at(step, "s3")

    def killed(*_: Any) -> Any:
        raise Killed

    def kill(site: str, order: Envelope) -> str | None:
        if met(site, order):
            monkeypatch.setattr("server.order_exchange.OrderExchange.quarantine", killed)
        return None

    with pytest.raises(Killed):
        sites.ask(ASKED, kill)
    monkeypatch.undo()
    assert is_pending(sites.folder, ASKED.data)
    assert sites.ask(ASKED) == whole


def test_a_site_without_the_data_set_is_missing_and_too_few_have_none(
    plain_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    lacking = {name: ({} if name == "s4" else sets) for name, sets in data.items()}
    sites = Sites(copied(plain_run, tmp_path / "one"), lacking, {"s0": JudgingTerms(least_items=6)})
    document = sites.ask(Request(data="test", metrics=["loss"]))
    assert document is not None
    assert document["missing"] == {
        "s0": "evaluation.least_items: this site tells nothing of fewer than 6 items",
        "s4": "site 's4' has no data set 'test', it has none",
    }
    assert document["n"] == sum(5 + 3 * number for number in (1, 2, 3, 5))
    few = Sites(copied(plain_run, tmp_path / "few"), {name: {} if name != "s0" else data[name] for name in NAMES})
    assert few.ask(Request(data="test", metrics=["loss"])) is None
    assert "1 sites judged the result, and the run needs 2" in few.reason()


def test_own_models_are_compared_with_the_common_one_at_their_sites(
    make_run: Callable[..., Path], data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    run = make_run(MASKED, {"own_steps": 3})
    document = Sites(run, data).ask(Request(data="test", metrics=["loss"], resamples=0))
    assert document is not None
    gains = []
    for own in sorted(run.glob("sites/*/run/own")):
        name = own.parts[-3]
        common, tuned = (
            pooled(which, {name: data[name]}, "test", ["loss"], tmp_path / name / which.name)["metrics"]["loss"][
                "value"
            ]
            for which in (run, own)
        )
        gains.append(tuned - common)
    assert gains, "no site has a model of its own"
    assert document["own_models"]["mean_gain"]["loss"] == pytest.approx(sum(gains) / len(NAMES), abs=1e-6)


def test_nothing_is_told_of_a_run_under_differential_privacy_unless_the_site_says_so(
    plain_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    folder = copied(plain_run, tmp_path)
    for name in ("s0", "s1"):
        recipe = folder / "sites" / name / "run" / "recipe.yaml"
        document = yaml.safe_load(recipe.read_text())
        document["privacy"]["differential_privacy"] = {"noise_multiplier": 1.0}
        document["aggregation"]["weights"] = "equal"
        recipe.write_text(yaml.safe_dump(document))
    terms = {"s1": JudgingTerms(least_items=2, despite_differential_privacy=True)}
    found = Sites(folder, data, terms).ask(Request(data="test", metrics=["loss"]))
    assert found is not None
    assert list(found["missing"]) == ["s0"], found["missing"]
    assert "covered by no ε" in found["missing"]["s0"]


def test_own_figures_are_told_where_sites_say_so(
    plain_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    terms = {name: JudgingTerms(least_items=2, tell_own_figures=True) for name in NAMES}
    everyone = Sites(copied(plain_run, tmp_path), data, terms).ask(Request(data="test", metrics=["loss"], resamples=50))
    assert everyone is not None
    sites = everyone["groups"]["site"]
    assert sorted(sites) == NAMES
    alone = pooled(plain_run, {"s5": data["s5"]}, "test", ["loss"], tmp_path / "alone")
    assert sites["s5"]["metrics"]["loss"]["value"] == pytest.approx(alone["metrics"]["loss"]["value"], abs=1e-6)
    worst = everyone["between_sites"]["metrics"]["loss"]
    losses = {name: site["metrics"]["loss"]["value"] for name, site in sites.items()}
    assert worst["worst"] == {"site": max(losses, key=losses.__getitem__), "value": max(losses.values())}
    assert worst["spread"] == max(losses.values()) - min(losses.values())


def test_a_site_answers_so_many_questions_and_masks_no_records_twice(
    judged: dict[str, tuple[Path, dict[str, Any]]], data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    folder, told = judged["plain"]
    sites = Sites(copied(folder, tmp_path / "plain"), data, dict.fromkeys(NAMES, JudgingTerms(1, 2)))
    assert sites.ask(ASKED) == told, "the same question"
    assert sites.ask(Request(data="test", metrics=["loss"])) is None
    assert "evaluation.most: this site answers 1 different evaluations of a run" in sites.reason()
    twice = {name: {**sets, "again": sets["choices"]} for name, sets in data.items()}
    masked = Sites(copied(judged["masked"][0], tmp_path / "masked"), twice)
    assert masked.ask(ASKED) == judged["masked"][1]
    for request in (Request(data="choices", metrics=["perplexity"]), Request(data="again", metrics=["loss"])):
        assert masked.ask(request) is None
        assert "these records were judged in it before (as 'choices')" in masked.reason()
    assert masked.ask(ASKED) == judged["masked"][1], "the first question has its answer still"


def test_a_question_that_was_cut_short_masks_no_records_that_another_has_masked_since(
    masked_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, first = Sites(copied(masked_run, tmp_path), data), Request(data="test", metrics=["perplexity"], resamples=0)

    def breaks(*_: Any) -> Any:
        raise RunError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("evaluation.federated.at_a_site.judged", breaks)
        assert sites.ask(first) is None
    assert sites.ask(Request(data="test", metrics=["loss"], resamples=0)) is not None
    assert sites.ask(first) is None
    assert "these records were judged in it before" in sites.reason()


def test_numbers_that_no_site_has_are_set_aside() -> None:
    plan = Plan(("accuracy",), ("a", "b"), resamples=0)
    fair = [4, 4, 3 << 20, 4 << 20, 2, 1, 0, 1]
    assert is_possible(plan, fair)
    for place, wrong in ((0, 0), (1, 5), (1, -1), (2, 5 << 20), (2, -1), (3, 1 << 20), (4, -2), (5, 9), (2, -(2**63))):
        assert not is_possible(plan, [wrong if number == place else value for number, value in enumerate(fair)])


def test_a_request_that_cannot_be_read_stops_no_other(tmp_path: Path) -> None:
    ask_for(tmp_path, Request(data="ward", metrics=["loss"]))
    commit_file(tmp_path / "evaluations" / "other" / "wanted.json", b'{"data": "other", "metrics": ["loss"], "new": 1}')
    assert [request.data for request in pending(tmp_path)] == ["ward"]
    with pytest.raises(InputError, match=r"max_tokens"):
        Request.of(data="ward", metrics=["loss"], max_tokens=10**6)
    with pytest.raises(InputError, match=r"labels"):
        Request.of(data="ward", metrics=["loss"], labels=["x" * 101])


def test_a_site_judges_the_result_that_it_saved_and_no_other(
    plain_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path
) -> None:
    sites = Sites(copied(plain_run, tmp_path), data)
    (sites.folder / "sites" / "s0" / "run" / "result.sha256").write_text("0" * 64)
    (sites.folder / "sites" / "s1" / "run" / "result.sha256").unlink()
    document = sites.ask(Request(data="test", metrics=["loss"]))
    assert document is not None
    assert document["missing"] == {
        "s0": "this site saved another result of the run, and judges no other",
        "s1": "this site has no result of the run: it was away when the run ended",
    }


@pytest.mark.parametrize(
    ("metrics", "reason"),
    [
        (["mine.py:score"], "no site runs anybody else's"),
        (["regex:Smith"], "a pattern from outside"),
        (["rubric"], "another model"),
        (["reward"], "another model"),
        (["macro_f1"], "--labels"),
        (["los"], "did you mean loss"),
        (["loss", "loss"], "named twice"),
    ],
)
def test_what_no_site_computes_is_refused(
    plain_run: Path, data: dict[str, dict[str, list[str]]], tmp_path: Path, metrics: list[str], reason: str
) -> None:
    sites = Sites(copied(plain_run, tmp_path), data)
    with pytest.raises(InputError, match=reason):
        Plan(tuple(metrics))
    # A server that does not check is told the same.
    order = Request(data="test", metrics=metrics).order("run", "0" * 64, 6)
    answer = sites.services()["s0"].handle(order.envelope())
    assert answer.kind == "refused"
    assert reason in answer.fields["reason"]
