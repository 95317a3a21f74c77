"""`fedloom privacy`: the account of a site, of a run, and what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core_training.engine import central
from core_training.engine.engine import open_engine
from core_training.foundation.errors import InputError
from core_training.privacy.accounting import Release, epsilon_of
from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger
from core_training.recipe.schema import Recipe
from core_training.runs.run_folder import RunFolder
from fedloom.commands.privacy import app
from fedloom.console import show_summary
from simulations import simulate

MakeRecipe = Callable[..., Recipe]
RELEASE = Release("record", 0.1, 1.0, 5)


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_sites_account_is_over_all_its_runs_and_beside_its_budget(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: a\nprivacy: {epsilon: 8, delta: 1.0e-06}\n")
    ledger = PrivacyLedger(tmp_path / LEDGER_FILE)
    for run in ("first", "second"):
        ledger.charge(run, 1, f"{hash(run) % 2**64:064x}", RELEASE)
    document: dict[str, Any] = json.loads(said(str(tmp_path), "--json"))
    (account,) = document["accounts"]
    assert account["epsilon"] == pytest.approx(epsilon_of([RELEASE] * 2, 1e-6))
    assert (account["unit"], account["delta"], account["releases"]) == ("record", 1e-6, 2)
    assert [one["run"] for one in account["runs"]] == ["first", "second"]
    assert document["budget"] == {"unit": "record", "epsilon": 8.0, "delta": 1e-6}
    words = said(str(tmp_path))
    assert f"ε {account['epsilon']:.3g} of 8 at δ 1e-06 for each record" in words
    assert "add or remove one unit" in words


def test_a_site_that_has_released_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("name: a\n")
    assert "nothing has been released" in said(str(tmp_path))


def test_a_federated_runs_account_is_that_of_its_summary(
    make_recipe: MakeRecipe, site_files: list[Path], tmp_path: Path
) -> None:
    recipe = make_recipe(
        topology={"kind": "federated", "rounds": 1, "local_steps": 2},
        privacy={"differential_privacy": {"noise_multiplier": 2.0}},
        simulation={"sites": [str(file) for file in site_files]},
    )
    summary = simulate(recipe, RunFolder(tmp_path / "run"))
    document = json.loads(said(str(tmp_path / "run"), "--json"))
    assert summary.privacy is not None
    assert document["epsilon"] == summary.privacy["epsilon"]
    assert set(document["sites"]) == set(summary.sites)
    assert "  site " in said(str(tmp_path / "run"))


def test_a_runs_end_says_what_it_came_to(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(privacy={"differential_privacy": {"noise_multiplier": 4.0}}, training={"max_steps": 2})
    summary = central.train(recipe, open_engine(recipe), RunFolder(tmp_path / "run"))
    show_summary(asdict(summary), "run", as_json=False, quiet=False)
    assert summary.privacy is not None
    assert f"privacy: ε {summary.privacy['epsilon']:.3g} at most at δ 1e-05 for each record" in capsys.readouterr().err


def test_other_folders_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        said(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no run that has ended, and no site"):
        said(str(tmp_path))
