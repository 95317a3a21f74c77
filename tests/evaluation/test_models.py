"""What a model is asked gives what plain code of transformers gives, and what its own run measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from core_training.engine.tokenising import is_held_out
from core_training.models.endings import own_settings_aside
from evaluation.answers import scoring
from evaluation.answers.prompts import Continued, continued, opening
from evaluation.answers.scoring import Scorer
from evaluation.answers.subjects import Subject, load_subject
from evaluation.answers.writing import Writer
from evaluation.items import Sampling, Task
from evaluation.running import Settings, evaluate
from evaluation.tasks.loading import Wanted, load_task
from tests import tiny
from tests.families.building import make_family


@pytest.fixture(scope="module")
def subject(run: Path) -> Subject:
    return load_subject(str(run))


@pytest.fixture(scope="module")
def task(pubmedqa_file: Path) -> Task:
    return load_task(str(pubmedqa_file))


@pytest.fixture(autouse=True)
def _several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens at once, so that these few questions are several batches."""
    monkeypatch.setattr(scoring, "_ON_A_CPU", 512)


def whole_forward(subject: Subject, ids: tuple[int, ...], start: int) -> float:
    """The log-probability of the tokens from `start` on, by one forward pass over the sequence alone."""
    with torch.no_grad():
        logps = subject.model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    return sum(float(logps[place - 1, ids[place]]) for place in range(start, len(ids)))


@pytest.mark.parametrize("chat", [None, False])
def test_choices_on_a_shared_cache_have_the_log_likelihoods_of_whole_forwards(subject, task, chat):
    asked = [continued(Task("t", [], (), chat=chat), item, item.choices, subject) for item in task.items]
    scorer = Scorer(subject)
    found = {one.id: one for batch in scorer.scored(asked) for one in batch}
    assert scorer.shares
    assert len(list(scorer.batches(asked))) > 1
    for one in asked:
        expected = [whole_forward(subject, whole, one.start) for whole in one.wholes]
        assert found[one.id].logps == pytest.approx(expected, abs=1e-5)


def test_computed_whole_the_choices_have_the_same_log_likelihoods(subject, task):
    asked = [continued(task, item, item.choices, subject) for item in task.items]
    shared = {one.id: one.logps for batch in Scorer(subject).scored(asked) for one in batch}
    whole = {one.id: one.logps for batch in Scorer(subject, shares=False).scored(asked) for one in batch}
    assert all(whole[name] == pytest.approx(shared[name], abs=1e-5) for name in shared)


def test_a_cache_that_misleads_is_found_out_and_not_used(subject, task, monkeypatch):
    wrong = Scorer._on_cache
    monkeypatch.setattr(
        Scorer,
        "_on_cache",
        lambda self, batch: [
            type(one)(one.id, tuple(logp - 5 for logp in one.logps), one.tokens) for one in wrong(self, batch)
        ],
    )
    asked = [continued(task, item, item.choices, subject) for item in task.items]
    scorer = Scorer(subject)
    found = {one.id: one for batch in scorer.scored(asked) for one in batch}
    assert not scorer.shares
    assert found[asked[0].id].logps[0] == pytest.approx(
        whole_forward(subject, asked[0].wholes[0], asked[0].start), abs=1e-5
    )


def test_an_answer_in_a_batch_is_the_one_that_is_written_alone(subject, task):
    prompts = {item.id: opening(task, item, subject) for item in task.items}
    writer = Writer(subject, Sampling(max_tokens=12))
    found = {one.id: one for batch in writer.written(prompts) for one in batch}
    for name, prompt in prompts.items():
        with torch.no_grad(), own_settings_aside(subject.model.get_base_model()):
            ids = torch.tensor([prompt])
            alone = subject.model.generate(
                input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2
            )
        new = alone[0, len(prompt) :].tolist()
        said = new[: new.index(2)] if 2 in new else new
        assert found[name].text == subject.tokenizer.decode(said, skip_special_tokens=True).strip()
        assert found[name].ended == (2 in new)


def test_draws_are_the_same_again_and_where_an_evaluation_goes_on(subject, task):
    prompts = {item.id: opening(task, item, subject) for item in task.items}
    sampling = Sampling(max_tokens=6, temperature=1.0, samples=3, seed=5)
    first, second = ([one for batch in Writer(subject, sampling).written(prompts) for one in batch] for _ in range(2))
    assert first == second
    assert len({one.text for one in first if one.id == first[0].id}) > 1
    known = {(one.id, one.sample) for one in first[:7]}
    rest = [one for batch in Writer(subject, sampling).written(prompts, known) for one in batch]
    assert rest == [one for one in first if (one.id, one.sample) not in known]


def held_out(site_files: list[Path]) -> list[dict[str, str]]:
    records = [json.loads(line) for path in site_files for line in path.read_text().splitlines()]
    return [r for r in records if is_held_out({"prompt": r["question"], "completion": r["answer"]}, 0.3)]


def test_the_loss_on_held_out_records_is_the_runs_own(run, site_files, tmp_path):
    file = tiny.write_jsonl(tmp_path / "held.jsonl", held_out(site_files))
    found = evaluate(
        [str(run)], [load_task(str(file), Wanted(("loss", "perplexity")))], Settings(), tmp_path, lambda *_: None
    ).results[0]
    own = json.loads((run / "summary.json").read_text())["eval_loss"]
    assert found.document["metrics"]["loss"]["value"] == pytest.approx(own, abs=1e-6)
    assert found.document["metrics"]["perplexity"]["value"] == pytest.approx(2.718281828459045**own, rel=1e-5)


def test_a_base_model_is_cut_where_the_run_beside_it_is(run, tiny_model, site_files, tmp_path):
    file = tiny.write_jsonl(tmp_path / "held.jsonl", held_out(site_files))
    ours, base = evaluate(
        [str(run), str(tiny_model)], [load_task(str(file), Wanted(("loss",)))], Settings(), tmp_path, lambda *_: None
    ).results
    before = json.loads((run / "summary.json").read_text())["eval_loss_initial"]
    assert base.document["metrics"]["loss"]["value"] == pytest.approx(before, abs=1e-6)
    assert ours.document["metrics"]["loss"]["value"] < before


def test_an_interrupted_evaluation_asks_only_what_is_left(run, pubmedqa_file, tmp_path):
    task = load_task(str(pubmedqa_file))
    whole = evaluate([str(run)], [task], Settings(), tmp_path, lambda *_: None).results[0]
    kept = tmp_path / "answers.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:9]) + lines[9][:30])  # killed while it wrote
    again = evaluate([str(run)], [task], Settings(), tmp_path, lambda *_: None).results[0]
    assert again.document == whole.document
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(item.id for item in task.items)
    assert rows[:9] == [json.loads(line) for line in lines[:9]]


def test_answers_to_other_questions_are_removed_and_it_is_told(run, pubmedqa_file, tmp_path):
    evaluate([str(run)], [load_task(str(pubmedqa_file))], Settings(), tmp_path, lambda *_: None)
    fewer = load_task(str(pubmedqa_file), Wanted(limit=4))
    found = evaluate([str(run)], [fewer], Settings(), tmp_path, lambda *_: None)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4
    assert "16 lines" in found.notes[0]


@pytest.mark.parametrize(("family", "shares"), [("gpt2", True), ("mamba", False), ("rwkv", False)])
def test_other_families_are_scored_and_written_as_alone(family, shares, tiny_model, tmp_path):
    subject = load_subject(str(make_family(family, tiny_model, tmp_path / family)))
    draw = torch.Generator().manual_seed(0)
    prompts = {str(n): torch.randint(5, 90, (5 + 6 * n,), generator=draw).tolist() for n in range(4)}
    ends = [torch.randint(5, 90, (1 + n,), generator=draw).tolist() for n in range(3)]
    asked = [Continued(name, tuple((*prompt, *end) for end in ends), len(prompt)) for name, prompt in prompts.items()]
    scorer = Scorer(subject)
    found = {one.id: one.logps for batch in scorer.scored(asked) for one in batch}
    assert scorer.shares is shares
    for one in asked:
        assert found[one.id] == pytest.approx([whole_forward(subject, ids, one.start) for ids in one.wholes], abs=1e-5)
    writer = Writer(subject, Sampling(max_tokens=6))
    together = {one.id: one.text for batch in writer.written(prompts) for one in batch}
    for name, prompt in prompts.items():
        ((alone,),) = writer.written({name: prompt})
        assert together[name] == alone.text


def test_a_system_text_is_folded_where_the_template_takes_none(tiny_model, tmp_path):
    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    template = (bare / "chat_template.jinja").read_text()
    (bare / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template
    )
    said = (("system", "Be brief."), ("user", "Fever?"), ("assistant", "Yes."))
    record = {"messages": [{"role": role, "content": text} for role, text in said]}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    subject, task = load_subject(str(bare)), load_task(str(tmp_path / "r.jsonl"))
    read = subject.tokenizer.decode(opening(task, task.items[0], subject))
    assert "Be brief." in read
    assert "Fever?" in read
