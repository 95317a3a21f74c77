"""What a recipe from outside may name at a site, and what becomes of it there."""

from pathlib import Path

import pytest
import yaml

from client.site_config import load_site_config, parse_site_config
from core_training.foundation.errors import InputError
from core_training.parts.stages.rollout import Rollout
from core_training.recipe.reading import parse_recipe
from core_training.recipe.schema import Recipe

SITE = """
name: hospital-a
server: fed.example.org:9092
data:
  questions: /srv/questions/*.jsonl
  notes: [notes/2024.jsonl, notes/2025.jsonl]
models: {tiny: models/tiny}
runs: {judge: runs/judge}
reward_functions: {politeness: rewards.py:polite}
deepspeed: {processes: 2, stage: 2}
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "site.yaml").write_text(SITE)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    return tmp_path


def recipe(**sections) -> Recipe:
    document = {"model": {"name_or_path": "tiny"}, "data": {"train": "questions"}, **sections}
    return parse_recipe(f"{{stage: sft, model: {document['model']}, data: {document['data']}}}").model_copy(
        update={key: value for key, value in sections.items() if key not in ("model", "data")}
    )


def test_names_become_the_sites_own_files_and_folder(site):
    resolved = load_site_config(site).resolve(recipe(data={"train": ["questions", "notes"], "eval": "notes"}))

    notes = [str(site / "notes/2024.jsonl"), str(site / "notes/2025.jsonl")]
    assert resolved.data.train == ["/srv/questions/*.jsonl", *notes]
    assert resolved.data.eval == notes
    assert resolved.model.name_or_path == str(site / "models/tiny")


def test_runs_and_reward_functions_are_the_sites_own(site):
    asked = recipe(model={"name_or_path": "tiny", "adapters": ["judge"]}, rollout=Rollout(reward_function="politeness"))
    resolved = load_site_config(site).resolve(asked)

    assert resolved.model.adapters == [str(site / "runs/judge")]
    assert resolved.rollout.reward_function == f"{site}/rewards.py:polite"
    assert resolved.engine_digest == asked.engine_digest
    judged = recipe(rollout=Rollout(reward_model="judge"))
    assert load_site_config(site).resolve(judged).rollout.reward_model == str(site / "runs/judge")


def test_the_site_decides_how_it_trains_and_where_it_writes(site):
    resolved = load_site_config(site).resolve(recipe(output="/etc/passwd"))

    assert (resolved.deepspeed.processes, resolved.deepspeed.stage) == (2, 2)
    assert resolved.output == "runs/latest"


def test_resolving_does_not_change_what_every_party_must_agree_on(site):
    asked = recipe()

    assert load_site_config(site).resolve(asked).engine_digest == asked.engine_digest


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"data": {"train": "/etc/passwd"}}, "has no data set '/etc/passwd', it has 'questions', 'notes'"),
        ({"data": {"train": ["questions", "../secrets"]}}, "has no data set '../secrets'"),
        ({"data": {"train": "questions", "eval": "/etc/passwd"}}, "data.eval"),
        ({"data": {"train": "null"}}, "has no data set 'null'"),
        ({"model": {"name_or_path": "/srv/models/other"}}, "has no model '/srv/models/other', it has 'tiny'"),
        ({"model": {"name_or_path": "tiny", "adapters": ["/srv/run"]}}, "model.adapters"),
        ({"rollout": Rollout(reward_function="/tmp/evil.py:run")}, "has no reward function '/tmp/evil.py:run'"),
        ({"rollout": Rollout(reward_model="../run")}, "rollout.reward_model"),
        ({"model": {"name_or_path": "tiny", "chat_template": "/etc/passwd"}}, "model.chat_template"),
    ],
)
def test_a_recipe_that_names_what_the_site_does_not_list_is_refused(site, sections, says):
    with pytest.raises(InputError, match=says.replace(".", r"\.")):
        load_site_config(site).resolve(recipe(**sections))


def test_a_recipe_without_a_data_set_is_refused(site):
    asked = recipe()

    with pytest.raises(InputError, match=r"names no data set; this site has 'questions', 'notes'"):
        load_site_config(site).resolve(asked.model_copy(update={"data": asked.data.model_copy(update={"train": None})}))


def test_a_recipe_that_names_a_deepspeed_file_is_refused(site):
    asked = recipe()
    deepspeed = asked.deepspeed.model_copy(update={"config": "/etc/passwd"})

    with pytest.raises(InputError, match=r"deepspeed\.config"):
        load_site_config(site).resolve(asked.model_copy(update={"deepspeed": deepspeed}))


def test_a_recipe_makes_no_site_report_anywhere_which_is_said(site, caplog):
    plain = recipe()
    training = plain.training.model_copy(update={"report_to": ["wandb", "csv"], "logging_steps": 5})
    resolved = load_site_config(site).resolve(recipe(training=training))
    assert (resolved.training.report_to, resolved.training.logging_steps) == ([], 5)
    assert "training.report_to: wandb, csv: a recipe from outside does not make this site report" in caplog.text
    assert recipe(training=training).engine_digest == plain.engine_digest, "how a curve is kept is each party's own"


def test_a_recipe_that_would_have_the_site_keep_its_records_elsewhere_is_refused(site):
    asked = recipe()
    data = asked.data.model_copy(update={"cache": "/tmp/elsewhere"})

    with pytest.raises(InputError, match=r"data\.cache"):
        load_site_config(site).resolve(asked.model_copy(update={"data": data}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: ../evil", "name"),
        ("name: a\nmodles: {}", "modles"),
        ("name: a\ndata: [1]", "data"),
        ("name: a\nmax_message_bytes: 0", "max_message_bytes"),
        ("just text", "the file"),
        ("name: [", "cannot be read"),
    ],
)
def test_a_malformed_site_file_is_named_with_its_key(tmp_path, text, says):
    (tmp_path / "site.yaml").write_text(text)

    with pytest.raises(InputError, match=says):
        load_site_config(tmp_path)


def test_a_folder_without_a_site_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="fedloom client init"):
        load_site_config(tmp_path)


def test_a_recipe_may_name_a_published_chat_template(site):
    asked = recipe(model={"name_or_path": "tiny", "chat_template": "chatml"})

    assert load_site_config(site).resolve(asked).model.chat_template == "chatml"


def test_added_tokens_are_those_of_a_named_template_or_of_the_sites_list(site):
    model = {"name_or_path": "tiny", "chat_template": "chatml"}
    asked = recipe(model={**model, "add_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert load_site_config(site).resolve(asked).model.add_tokens == ["<|im_start|>", "<|im_end|>"]

    probing = recipe(model={**model, "add_tokens": ["Jane Doe"]})
    with pytest.raises(InputError, match=r"model\.add_tokens: 'Jane Doe' is none .*add_tokens in site\.yaml"):
        load_site_config(site).resolve(probing)
    config = load_site_config(site).model_copy(update={"add_tokens": ["Jane Doe"]})
    assert config.resolve(probing).model.add_tokens == ["Jane Doe"]


def test_a_sites_model_may_be_a_name_on_the_hub(site):
    document = yaml.safe_load((site / "site.yaml").read_text())
    document["models"]["published"] = "org/tiny@v1"
    (site / "site.yaml").write_text(yaml.safe_dump(document))
    asked = recipe(model={"name_or_path": "published"})
    assert load_site_config(site).resolve(asked).model.name_or_path == "org/tiny@v1"
    (site / "org" / "tiny@v1").mkdir(parents=True)
    assert load_site_config(site).resolve(asked).model.name_or_path == str(site / "org" / "tiny@v1")


def test_a_recipe_names_no_revision_of_a_sites_model(site):
    with pytest.raises(InputError, match=r"has no model 'tiny@refs/pr/3', it has 'tiny'"):
        load_site_config(site).resolve(recipe(model={"name_or_path": "tiny@refs/pr/3"}))


def test_a_recipe_makes_a_site_fetch_only_what_the_site_allows(site):
    asked = recipe(model={"name_or_path": "tiny", "download": True})
    with pytest.raises(
        InputError, match=r"model\.download: site 'hospital-a' fetches nothing for a recipe from outside"
    ):
        load_site_config(site).resolve(asked)
    with (site / "site.yaml").open("a") as file:
        file.write("download: true\n")
    assert load_site_config(site).resolve(asked).model.download


def test_a_sites_data_may_be_a_name_on_the_hub(site):
    document = yaml.safe_load((site / "site.yaml").read_text())
    document["data"]["published"] = "org/notes"
    (site / "site.yaml").write_text(yaml.safe_dump(document))
    config = load_site_config(site)
    assert config.data["published"] == ["org/notes"]
    (site / "org" / "notes").mkdir(parents=True)
    assert load_site_config(site).data["published"] == [str(site / "org" / "notes")]


def test_what_a_site_tells_of_evaluations_is_little_unless_it_says_more() -> None:
    told = parse_site_config({"name": "north"}, "site.yaml").evaluation
    assert (told.most, told.least_items, told.tell_own_figures, told.despite_differential_privacy) == (
        8,
        10,
        False,
        False,
    )
    assert parse_site_config({"name": "north", "evaluation": {"most": 0}}, "site.yaml").evaluation.most == 0
    with pytest.raises(InputError, match=r"evaluation\.most"):
        parse_site_config({"name": "north", "evaluation": {"most": -1}}, "site.yaml")
