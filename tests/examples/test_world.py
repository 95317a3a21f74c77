"""The demo's invented world: fair to ask about, the same for the same seed, and with nothing given away."""

from pathlib import Path

import pytest

from core_training.data.records import read_records
from examples.demo.world import HELD_OUT_PHRASINGS, QUESTIONS, World, invent, write


@pytest.fixture(scope="module")
def world() -> World:
    return invent(seed=1)


def test_one_seed_gives_one_world_down_to_the_files_bytes(tmp_path: Path, world: World) -> None:
    write(world, tmp_path / "one")
    write(invent(seed=1), tmp_path / "two")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.gz"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert invent(seed=2) != world


def test_no_question_asked_in_the_end_is_trained_on_anywhere(world: World) -> None:
    trained = {q.prompt for hospital in world.hospitals for q in hospital.training} | {q.prompt for q in world.common}
    assert all(q.prompt not in trained for hospital in world.hospitals for q in hospital.held_out)


def test_every_fact_is_taught_and_asked_in_all_its_phrasings_once(world: World) -> None:
    for hospital in world.hospitals:
        for fact in hospital.facts:
            wanted = {question.format(name=fact.disease) for question in QUESTIONS[fact.topic]}
            taught = [q for q in hospital.training if q.prompt in wanted]
            asked = [q for q in hospital.held_out if q.prompt in wanted]
            assert len(asked) == HELD_OUT_PHRASINGS
            assert {q.prompt for q in taught + asked} == wanted
            assert {q.completion for q in taught + asked} == {fact.answer}


def test_hospitals_share_no_disease_and_common_knowledge_names_none_of_theirs(world: World) -> None:
    diseases = [{fact.disease for fact in hospital.facts} for hospital in world.hospitals]
    assert len(set().union(*diseases)) == sum(map(len, diseases))
    common = " ".join(f"{q.prompt} {q.completion}" for q in world.common)
    assert not [name for names in diseases for name in names if name in common]


def test_common_knowledge_holds_every_word_of_the_hospitals_answers(world: World) -> None:
    known = {word for q in world.common for word in q.completion.split()}
    answers = {word for hospital in world.hospitals for fact in hospital.facts for word in fact.answer.split()}
    assert answers <= known


def test_the_files_are_read_back_under_the_hospitals_names(tmp_path: Path, world: World) -> None:
    write(world, tmp_path)
    for hospital in world.hospitals:
        records = list(read_records(tmp_path / "data" / f"{hospital.name}.jsonl.gz"))
        assert {record.source for record in records} == {hospital.name}
        pairs = [(record.fields["prompt"], record.fields["completion"]) for record in records]
        assert pairs == [(q.prompt, q.completion) for q in hospital.training]
