"""Files in the formats that people have become items as they are; what is wrong in them is told with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from core_training.foundation.errors import InputError
from evaluation.tasks.formats import Reading, read_items
from evaluation.tasks.loading import Wanted, load_task
from tests.evaluation.conftest import pubmedqa

MEDMCQA = {"question": "Which ward?", "opa": "Heart", "opb": "Lung", "opc": "Skin", "opd": "Eye", "exp": "Fever."}


def jsonl(path: Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_pubmedqa_is_an_object_by_identifier(pubmedqa_file):
    read = read_items(str(pubmedqa_file))
    first = read.items[0]
    assert (read.kind, len(read.items), first.id) == ("choice", 16, "100")
    assert (first.labels, first.expected, first.columns["YEAR"]) == (("yes", "no", "maybe"), "yes", "2000")
    assert first.plain.endswith("Question: Does case 0 go to the heart ward?\nAnswer:")
    assert "It does." not in first.plain


def test_medqa_has_endings(tmp_path):
    record = {"id": "a", "sent1": "A rash.", "sent2": "Where?", "label": 2, **{f"ending{n}": f"w{n}" for n in range(4)}}
    (item,) = read_items(jsonl(tmp_path / "medqa.jsonl", record)).items
    assert item.plain == "A rash. Where?\nA. w0\nB. w1\nC. w2\nD. w3\nAnswer:"
    assert (item.gold, item.expected, item.references) == (2, "C", ("w2", "C"))


def test_medqa_has_options_by_letter(tmp_path):
    record = {"question": "Where?", "options": {"A": "heart", "B": "lung"}, "answer": "lung", "answer_idx": "B"}
    (item,) = read_items(jsonl(tmp_path / "medqa.jsonl", record)).items
    assert (item.gold, item.id) == (1, "medqa:1")


@pytest.mark.parametrize(("cops", "golds", "told"), [((0, 3), [0, 3], False), ((1, 4), [0, 3], True)])
def test_medmcqas_answers_are_counted_from_0_or_from_1_and_the_latter_is_told(tmp_path, cops, golds, told):
    read = read_items(jsonl(tmp_path / "m.jsonl", *({**MEDMCQA, "cop": cop} for cop in cops)))
    assert [item.gold for item in read.items] == golds
    assert ("answers are counted from 1" in " ".join(read.notes)) is told


def test_a_task_file_settles_what_its_numbers_begin_with(tmp_path):
    jsonl(tmp_path / "m.jsonl", {**MEDMCQA, "cop": 2})
    (tmp_path / "task.yaml").write_text("data: m.jsonl\nlabel_base: 1\n")
    assert load_task(str(tmp_path / "task.yaml")).items[0].gold == 1


def test_a_label_out_of_range_is_told_with_both_ways_to_count(tmp_path):
    file = jsonl(tmp_path / "m.jsonl", {**MEDMCQA, "cop": 0}, {**MEDMCQA, "cop": 4})
    with pytest.raises(InputError, match=r"line 2: label 4 is out of range: it has choices 0 to 3 .*line 1 has 0"):
        read_items(file)
    with pytest.raises(InputError, match="label 7 is out of range"):
        read_items(jsonl(tmp_path / "n.jsonl", {**MEDMCQA, "cop": 7}))


@pytest.mark.parametrize(("answer", "gold"), [(1, 1), ("1", 1), ("B", 1), ("b", 1), ("Lung", 1)])
def test_mmlus_answer_is_a_number_a_letter_or_the_choice(tmp_path, answer, gold):
    record = {"question": "Which?", "choices": ["Heart", "Lung", "Skin"], "answer": answer}
    assert read_items(jsonl(tmp_path / "m.jsonl", record)).items[0].gold == gold


def test_an_answer_that_is_no_choice_is_told(tmp_path):
    record = {"question": "Which?", "choices": ["Heart", "Lung"], "answer": "Bone"}
    with pytest.raises(InputError, match="the answer 'Bone' is none of its choices; it must be a number from 0 to 1"):
        read_items(jsonl(tmp_path / "m.jsonl", record))


def test_missing_answers_are_counted_and_may_be_skipped(tmp_path):
    file = jsonl(tmp_path / "m.jsonl", {**MEDMCQA, "cop": 0}, {**MEDMCQA, "cop": -1}, {**MEDMCQA, "cop": None})
    with pytest.raises(InputError, match=r"line 2: no answer \(-1\); 2 of 3 items have none"):
        read_items(file)
    (tmp_path / "task.yaml").write_text("data: m.jsonl\nmissing: skip\n")
    task = load_task(str(tmp_path / "task.yaml"))
    assert len(task.items) == 1
    assert "2 items without an answer are left out" in task.notes[0]


def test_an_empty_file_is_no_task(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match="it holds no items"):
        read_items(str(tmp_path / "none.jsonl"))
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(InputError, match="it holds no items"):
        read_items(str(tmp_path / "none.json"))


def test_an_identifier_given_twice_is_told_with_both_places(tmp_path):
    record = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "id": "7"}
    with pytest.raises(InputError, match=r"line 2: identifier '7' is that of .*line 1, too"):
        read_items(jsonl(tmp_path / "m.jsonl", record, record))


def test_records_and_conversations_are_questions_with_answers(tmp_path):
    turns = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Rest."}]
    for record in (
        {"prompt": "And now?", "completion": "Rest."},
        {"question": "And now?", "answer": "Rest."},
        {"messages": turns},
        {"instruction": "And now?", "output": "Rest."},
    ):
        (item,) = read_items(jsonl(tmp_path / "r.jsonl", record)).items
        assert (item.plain, item.references, item.is_readable) == ("And now?", ("Rest.",), True)
    (item,) = read_items(jsonl(tmp_path / "r.jsonl", {"messages": turns + turns})).items
    assert (item.plain, len(item.prompt)) == ("", 3)


def test_columns_of_other_names_are_mapped(tmp_path):
    jsonl(tmp_path / "r.jsonl", {"frage": "Wo?", "antwort": "Hier."})
    with pytest.raises(InputError, match="no kind of task has these columns"):
        load_task(str(tmp_path / "r.jsonl"))
    (tmp_path / "t.yaml").write_text("data: r.jsonl\ncolumns: {prompt: frage, completion: antwort}\n")
    assert load_task(str(tmp_path / "t.yaml")).items[0].references == ("Hier.",)
    of_a_run = Wanted(columns={"prompt": "frage", "completion": "antwort"})
    assert load_task(str(tmp_path / "r.jsonl"), of_a_run).items[0].references == ("Hier.",)


def test_healthbench_has_rubrics(tmp_path):
    record = {
        "prompt_id": "x", "prompt": [{"role": "user", "content": "Hm?"}],
        "rubrics": [{"criterion": "Says so", "points": 5, "tags": []}, {"criterion": "Lies", "points": -3}],
    }  # fmt: skip
    read = read_items(jsonl(tmp_path / "h.jsonl", record))
    assert (read.kind, read.items[0].id) == ("rubric", "x")
    assert [one.points for one in read.items[0].rubric] == [5.0, -3.0]
    with pytest.raises(InputError, match="some of them above 0"):
        read_items(jsonl(tmp_path / "i.jsonl", {**record, "rubrics": [{"criterion": "Lies", "points": -3}]}))


def test_a_task_of_ones_own_is_made_by_templates(tmp_path):
    jsonl(tmp_path / "w.jsonl", {"sign": "fever", "ward": "heart"}, {"sign": "rash", "ward": "skin"})
    (tmp_path / "w.yaml").write_text(
        "name: wards\ndata: w.jsonl\nprompt: 'Ward for {{ sign }}:'\nchoices: [heart, skin]\nanswer: ward\n"
        "metrics: [accuracy]\nsystem: Be brief.\n"
    )
    task = load_task(str(tmp_path / "w.yaml"))
    assert (task.name, task.metrics, [item.gold for item in task.items]) == ("wards", ("accuracy",), [0, 1])
    assert task.items[1].plain == "Ward for rash:"
    assert [message["role"] for message in task.items[0].prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: w.jsonl\nprompts: x\n", "prompts: Extra inputs are not permitted; known are name, data"),
        ("data: w.jsonl\nprompt: '{{ nothing }}'\nanswer: ward\n", "prompt: 'nothing' is undefined; its columns are"),
        ("data: w.jsonl\nprompt: sign\nchoices: [a, b]\n", "choices need an answer"),
        ("data: w.jsonl\nprompt: sign\nmetrics: [acc]\n", "there is no metric 'acc'"),
        ("- a\n", "a task is a mapping"),
        ("prompt: '{{ ''.__class__.__mro__ }}'\ndata: w.jsonl\n", "prompt: "),
    ],
)
def test_what_is_wrong_in_a_task_file_is_named(tmp_path, text, said):
    jsonl(tmp_path / "w.jsonl", {"sign": "fever", "ward": "heart"})
    (tmp_path / "w.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        load_task(str(tmp_path / "w.yaml"))


HARNESS = """
task: wards
dataset_path: json
dataset_kwargs: {data_files: {test: w.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Sign: {{ sign }}\\nWard:"
doc_to_choice: ["heart", "skin"]
doc_to_target: "{{ ['heart', 'skin'].index(ward) }}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm}]
metadata: {version: 1.0}
"""


def test_a_harness_task_on_local_data_is_read(tmp_path):
    jsonl(tmp_path / "w.jsonl", {"sign": "fever", "ward": "heart"}, {"sign": "rash", "ward": "skin"})
    (tmp_path / "w.yaml").write_text(HARNESS)
    task = load_task(str(tmp_path / "w.yaml"))
    assert (task.name, task.chat, task.metrics) == ("wards", False, ("accuracy", "accuracy_per_character"))
    assert [(item.plain, item.choices, item.gold) for item in task.items] == [
        ("Sign: fever\nWard:", ("heart", "skin"), 0),
        ("Sign: rash\nWard:", ("heart", "skin"), 1),
    ]


def test_harness_tasks_that_generate_or_score_a_text_are_read(tmp_path):
    jsonl(tmp_path / "w.jsonl", {"sign": "fever", "ward": "heart"})
    start = "dataset_path: w.jsonl\ndoc_to_text: sign\ndoc_to_target: ward\n"
    (tmp_path / "g.yaml").write_text(start + "generation_kwargs: {until: ['.'], max_gen_toks: 9}\n")
    task = load_task(str(tmp_path / "g.yaml"))
    assert "up to white space here" in task.notes[0]
    assert (task.metrics, task.stop, task.max_tokens) == (("exact_match",), (".",), 9)
    assert (task.items[0].plain, task.items[0].references) == ("fever", ("heart",))
    (tmp_path / "l.yaml").write_text(start + "output_type: loglikelihood\n")
    assert load_task(str(tmp_path / "l.yaml")).metrics == ("perplexity_per_item",)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("doc_to_text:", "process_docs: !function utils.f\ndoc_to_text:", "process_docs: !function utils.f is Python"),
        ("doc_to_text:", "num_fewshot: 5\ndoc_to_text:", "num_fewshot: 5: examples before a question"),
        ("doc_to_text:", "filter_list: [{name: x, filter: [{function: regex}]}]\ndoc_to_text:", "filter_list: 'regex'"),
        ("doc_to_text:", "doc_to_image: x\ndoc_to_text:", "doc_to_image: it is not supported"),
        ("multiple_choice", "loglikelihood_rolling", "output_type: 'loglikelihood_rolling' is none of"),
        ("metric: acc,", "metric: mcc,", "metric_list: 'mcc' is none of acc, acc_norm of"),
        ("metric: acc,", "metric: f1,", "metric_list: f1: there it is that of label 1 alone"),
        ("metric: acc,", "metric: exact_match,", "metric_list: exact_match: there texts are compared as they are"),
        ("aggregation: mean", "aggregation: perplexity", "acc: aggregation 'perplexity' is not supported"),
        ("dataset_path: json", "dataset_path: super_glue", "dataset_path: 'super_glue' is no local data"),
        ("test_split: test", "test_split: dev", "test_split: 'dev' is none of the data's parts: test"),
    ],
)
def test_what_a_harness_task_asks_for_in_vain_is_refused_by_name(tmp_path, old, new, said):
    jsonl(tmp_path / "w.jsonl", {"sign": "fever", "ward": "heart"})
    (tmp_path / "w.yaml").write_text(HARNESS.replace(old, new, 1))
    with pytest.raises(InputError, match=said):
        load_task(str(tmp_path / "w.yaml"))


def test_questions_of_pubmedqas_other_copy_are_read(tmp_path):
    one = pubmedqa(1)["100"]
    record = {
        "pubid": 5, "question": one["QUESTION"], "context": {"contexts": one["CONTEXTS"]}, "final_decision": "maybe",
    }  # fmt: skip
    (item,) = read_items(jsonl(tmp_path / "p.jsonl", record)).items
    assert (item.id, item.gold) == ("5", 2)


MMLU = {"question": "Which?", "choices": ["Heart", "Lung"], "answer": 0}
OPTIONS = {"question": "Where?", "options": {"A": "heart", "B": "lung"}, "answer_idx": "B"}
RUBRICS = {"prompt": "Hm?", "rubrics": [{"criterion": "Says so", "points": 5}]}


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (MMLU, {"question": "Which?", "answer": "Heart"}, "line 2: it has no column 'choices'"),
        (OPTIONS, {"question": "Where?", "answer_idx": "B"}, "line 2: it has no column 'options'"),
        (OPTIONS, {**OPTIONS, "options": 3}, "line 2: 'options' must be"),
        (RUBRICS, {"prompt": "Hm?"}, "line 2: it has no column 'rubrics'"),
        (RUBRICS, {**RUBRICS, "rubrics": 4}, "line 2: 'rubrics' must be a list, not 4"),
        (RUBRICS, {"rubrics": RUBRICS["rubrics"]}, "line 2: it has no column 'prompt'"),
        ({"prompt": "Hm?"}, {"text": "Hm."}, "line 2: it has no column 'question'"),
    ],
)
def test_a_record_of_another_kind_than_the_first_is_told_with_its_line(tmp_path, first, second, said):
    with pytest.raises(InputError, match=said):
        read_items(jsonl(tmp_path / "m.jsonl", first, second))


def test_numbers_that_may_be_counted_either_way_are_always_told(tmp_path):
    read = read_items(jsonl(tmp_path / "m.jsonl", *({**MEDMCQA, "cop": cop} for cop in (1, 2, 3, 1, 2, 3))))
    assert [item.gold for item in read.items] == [1, 2, 3, 1, 2, 3]
    assert "taken as counted from 0" in read.notes[0]
    assert "label_base: 1 in a TASK.yaml" in read.notes[0]


def test_a_letter_that_is_no_options_is_an_error(tmp_path):
    options = {"A": "heart", "C": "lung", "D": "skin"}
    file = jsonl(tmp_path / "m.jsonl", {**OPTIONS, "options": options})
    with pytest.raises(InputError, match="answer_idx: 'B' is none of its choices A, C, D"):
        read_items(file)
    read = read_items(jsonl(tmp_path / "n.jsonl", {**OPTIONS, "options": options, "answer_idx": "C"}))
    assert (read.items[0].gold, read.notes) == (1, ())


def test_an_answer_that_is_a_choices_text_is_that_choice_and_a_clash_is_told(tmp_path):
    numbers = {"question": "How many?", "choices": ["1", "2", "3", "4"]}
    for answers, golds in ((("2", "4"), [1, 3]), ((2, 0), [2, 0])):
        read = read_items(jsonl(tmp_path / "m.jsonl", *({**numbers, "answer": answer} for answer in answers)))
        assert [item.gold for item in read.items] == golds
        assert ("1 answers are the text of one choice" in " ".join(read.notes)) is (answers[0] == "2")
    swapped = {"question": "Which?", "choices": ["B", "A"], "answer": "A"}
    read = read_items(jsonl(tmp_path / "n.jsonl", swapped))
    assert read.items[0].gold == 1
    assert "line 1: 'A'): the text is taken" in read.notes[0]


def test_a_harness_tasks_numbers_are_counted_from_0_and_are_no_texts(tmp_path):
    jsonl(tmp_path / "w.jsonl", {"sign": "fever", "at": 1}, {"sign": "rash", "at": 2})
    text = HARNESS.replace('["heart", "skin"]', '["1", "2", "3"]', 1)
    (tmp_path / "w.yaml").write_text(text.replace("\"{{ ['heart', 'skin'].index(ward) }}\"", "'{{ at }}'"))
    task = load_task(str(tmp_path / "w.yaml"))
    assert ([item.gold for item in task.items], task.notes) == ([1, 2], ())


PRO = {"question": "Where?", "options": ["heart", "lung", "skin"], "answer": "B", "answer_index": 1, "category": "x"}


@pytest.mark.parametrize(
    "record",
    [
        PRO,
        {**PRO, "answer": None},
        {"question": "Where?", "options": PRO["options"], "answer": "lung"},
        {
            "question": "Where?", "answer": "lung", "answer_idx": "B",
            "options": [{"key": key, "value": value} for key, value in zip("ABC", PRO["options"], strict=True)],
        },
    ],
)  # fmt: skip
def test_options_as_a_list_are_choices(tmp_path, record):
    read = read_items(jsonl(tmp_path / "m.jsonl", record))
    (item,) = read.items
    assert (read.kind, item.gold, item.labels, item.references) == ("choice", 1, ("A", "B", "C"), ("lung", "B"))
    assert "C. skin" in item.plain
    assert read.notes == ()


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**PRO, "answer_index": 2}, "answer_index 2, answer 'B' are different choices"),
        ({**PRO, "options": "heart, lung"}, "'options' must be texts by letter, a list of texts"),
        ({**PRO, "options": [{"text": "heart"}]}, "'options' must be texts by letter, a list of texts"),
        ({**PRO, "answer": "E"}, "answer: 'E' is none of its choices A, B, C"),
        ({"prompt": "Where?", "completion": "B", "choices": ["heart", "lung"]}, "it has choices"),
    ],
)
def test_choices_are_never_read_as_free_text(tmp_path, record, said):
    with pytest.raises(InputError, match=said):
        read_items(jsonl(tmp_path / "m.jsonl", record))


def test_a_runs_names_of_columns_hide_no_choices(tmp_path):
    of_a_run = Reading(usual_columns={"prompt": "question", "completion": "answer"})
    for record in (PRO, {**MMLU, "answer": "Heart"}):
        assert read_items(jsonl(tmp_path / "m.jsonl", record), of_a_run).kind == "choice"


def test_two_records_under_one_key_are_an_error_and_none_vanishes(tmp_path):
    one, other = (json.dumps(record) for record in pubmedqa(2).values())
    (tmp_path / "p.json").write_text(f'{{"1": {one}, "1": {other}, "2": {one}}}')
    with pytest.raises(InputError, match=r"p\.json: an object has the key '1' 2 times"):
        read_items(str(tmp_path / "p.json"))


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for site in ("north", "south"):
        (tmp_path / site).mkdir()
        jsonl(tmp_path / site / "eval.jsonl", MMLU, MMLU)
    jsonl(tmp_path / "other.jsonl", MMLU)
    read = read_items([str(tmp_path / "*" / "eval.jsonl"), str(tmp_path / "other.jsonl")])
    assert [item.id for item in read.items] == [
        "north/eval:1", "north/eval:2", "south/eval:1", "south/eval:2", "other:1",
    ]  # fmt: skip
    assert [item.site for item in read.items] == [*["north/eval"] * 2, *["south/eval"] * 2, "other"]


def test_parts_of_one_data_set_are_one_site_and_have_identifiers_of_their_own(tmp_path):
    for number in (0, 1):
        jsonl(tmp_path / f"ward-0000{number}-of-00002.jsonl", MMLU)
    read = read_items(str(tmp_path / "*.jsonl"))
    assert {item.site for item in read.items} == {"ward"}
    assert [item.id for item in read.items] == ["ward-00000-of-00002.jsonl:1", "ward-00001-of-00002.jsonl:1"]


def test_a_harness_task_without_a_list_measures_what_it_would(tmp_path):
    jsonl(tmp_path / "w.jsonl", {"sign": "fever", "ward": "heart"})
    (tmp_path / "w.yaml").write_text("".join(f"{line}\n" for line in HARNESS.splitlines() if "metric_list" not in line))
    assert load_task(str(tmp_path / "w.yaml")).metrics == ("accuracy", "accuracy_per_character")


@pytest.mark.parametrize("columns", [{}, {"prompt": "question", "completion": "answer"}])
@pytest.mark.parametrize("empty", ["", " ", None])
def test_answers_in_words_that_are_missing_are_counted_and_may_be_skipped(tmp_path, columns, empty):
    file = jsonl(tmp_path / "q.jsonl", {"question": "Where?", "answer": "Here."}, {"question": "Who?", "answer": empty})
    with pytest.raises(InputError, match=r"line 2: no answer \(None\); 1 of 2 items have none"):
        read_items(file, Reading(columns))
    read = read_items(file, Reading(columns, skip_unanswered=True))
    assert [item.references for item in read.items] == [("Here.",)]
    assert "1 items without an answer are left out" in read.notes[0]


@pytest.mark.parametrize("columns", [{}, {"prompt": "question", "completion": "answer"}])
def test_what_is_wrong_in_an_answer_is_told_by_the_files_own_column(tmp_path, columns):
    file = jsonl(tmp_path / "q.jsonl", {"question": "Where?", "answer": ["x"]})
    with pytest.raises(InputError, match="line 1: 'answer' must be"):
        read_items(file, Reading(columns))
    with pytest.raises(InputError, match="line 1: the question is empty"):
        read_items(jsonl(tmp_path / "r.jsonl", {"question": "", "answer": "x"}), Reading(columns))


def test_a_number_is_an_answer_in_words(tmp_path):
    read = read_items(jsonl(tmp_path / "q.jsonl", {"question": "How many?", "answer": 42}))
    assert (read.items[0].references, read.items[0].record.fields["completion"]) == (("42",), "42")


def test_pubmedqa_without_decisions_has_no_answers(tmp_path):
    one = {name: value for name, value in pubmedqa(1)["100"].items() if name != "final_decision"}
    with pytest.raises(InputError, match="no answer \\(None\\); 1 of 1 items have none"):
        read_items(jsonl(tmp_path / "p.jsonl", one))
