"""The documents agree with the program: links resolve, commands and options exist, examples are valid."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest
import typer
import yaml
from typer.testing import CliRunner

from client.site_config import parse_site_config
from core_training.recipe.reading import parse_recipe
from fedloom.cli import COMMANDS
from fedloom.commands import recipe

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
SHELL = ("sh", "bash", "shell", "console", "text", "")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def fenced(page: Path, *languages: str) -> list[str]:
    """The content of a page's fenced blocks in these languages."""
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks and inline code."""
    return re.sub(r"`[^`]*`", "`", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(page: Path) -> list[list[str]]:
    """The words after `fedloom` of every command line in a page's fenced blocks, continued lines joined."""
    lines = [line for body in fenced(page, *SHELL) for line in body.replace("\\\n", " ").splitlines()]
    commands = [re.fullmatch(r"\s*(?:\$ )?fedloom (.*)", line) for line in lines]
    return [shlex.split(command[1], comments=True) for command in commands if command is not None]


def parse(words: list[str]) -> None:
    """Parse a command line as the program would, without running it. Raises click's errors."""
    words = [word for word in words if word != "--traceback"]
    assert words[0] in COMMANDS, f"there is no command '{words[0]}'"
    command = typer.main.get_command(import_module(f"fedloom.commands.{words[0]}").app)
    name, arguments = words[0], words[1:]
    if isinstance(command, click.Group):
        name, arguments = arguments[0], arguments[1:]
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"'{words[0]}' has no command '{name}'"
        command = found
    command.make_context(name, list(arguments))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_to_a_file_and_its_heading(page):
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_line_names_a_real_command_with_real_options(page):
    wrong = []
    for words in command_lines(page):
        try:
            parse(words)
        except (AssertionError, click.UsageError) as error:
            wrong.append(f"fedloom {shlex.join(words)}: {error}")
    assert not wrong


def test_the_deployment_page_shows_command_lines_of_all_parties():
    parties = {words[0] for words in command_lines(ROOT / "docs" / "deploy.md")}
    assert {"server", "client", "p2p", "train"} <= parties


def test_a_wrong_option_would_be_found():
    with pytest.raises(click.UsageError):
        parse(["server", "start", "--portable"])
    with pytest.raises(AssertionError):
        parse(["server", "restart"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_recipe_and_site_file_shown_is_valid(page):
    for body in fenced(page, "yaml"):
        document = yaml.safe_load(body)
        if "stage" in document:
            parse_recipe(body, source=name_of(page))
        elif "models" in document:
            parse_site_config(document, source=name_of(page))


def test_every_decision_is_in_the_list():
    pages = sorted(page.name for page in (ROOT / "docs" / "decisions").glob("0*.md"))
    assert LINK.findall((ROOT / "docs" / "decisions" / "README.md").read_text()) == pages


def test_the_recipe_page_is_what_the_command_prints():
    printed = CliRunner().invoke(recipe.app, ["schema", "--markdown"])
    assert printed.exit_code == 0
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == printed.stdout, "docs/recipe.md is out of date: make docs"
