"""`fedloom privacy`: what runs have told of any one record or patient, as differential privacy counts it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from core_training.foundation.errors import InputError
from fedloom.options import Json, print_answer

app = typer.Typer()

_SITE_FILE = "site.yaml"


@app.command()
def privacy(
    folder: Annotated[Path, typer.Argument(metavar="RUN|SITE", help="A run folder, or a site's.", show_default=False)],
    delta: Annotated[
        float, typer.Option(help="The δ to count at, where no budget says it.", min=1e-15, max=0.1)
    ] = 1e-5,
    as_json: Json = False,
) -> None:
    """Show ε, δ, unit, mechanism, adjacency and assumptions: of a site over all its runs, or of one run.

    A site's and a central run's figures are computed from the account that they keep (privacy-ledger.jsonl); a
    federated run's are those of its summary, at the site that it is weakest for.
    """
    from core_training.privacy.ledger import LEDGER_FILE, PrivacyLedger

    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name a run folder, or a site's")
    is_site = (folder / _SITE_FILE).is_file()
    if not is_site and not (folder / LEDGER_FILE).is_file():
        account = _of_summary(folder)
        print_answer(account, _in_words(account), as_json=as_json)
        return
    budget = _budget(folder) if is_site else None
    lines = PrivacyLedger(folder / LEDGER_FILE).lines()
    from core_training.privacy.folder_account import accounts_of

    accounts = [one.to_json() for one in accounts_of(lines, delta, budget)]
    said: dict[str, Any] = {"folder": str(folder), "accounts": accounts, "budget": None}
    if budget is not None:
        said["budget"] = {"unit": budget.unit, "epsilon": budget.epsilon, "delta": budget.delta}
    words = [_in_words(one, budget.epsilon if budget and one["unit"] == budget.unit else None) for one in accounts]
    print_answer(said, "\n".join(words) or f"{folder}: nothing has been released", as_json=as_json)


def _budget(folder: Path) -> Any:
    from client.site_config import load_site_config

    config = load_site_config(folder)
    return config.privacy.budget if config.privacy else None


def _of_summary(folder: Path) -> dict[str, Any]:
    from core_training.privacy.account import assumptions_of
    from core_training.runs.run_folder import RunFolder

    summary = RunFolder(folder).summary()
    account = (summary or {}).get("privacy")
    if summary is None or not isinstance(account, dict):
        why = "the run has no differential privacy" if summary else "no run that has ended, and no site"
        raise InputError(f"{folder}: {why}; name a site's folder, or a run with privacy.differential_privacy")
    sites = {name: site.get("epsilon") for name, site in summary["sites"].items() if isinstance(site, dict)}
    return {**account, "sites": sites, "assumptions": assumptions_of(str(account["unit"]))}


def _in_words(account: dict[str, Any], budget: float | None = None) -> str:
    epsilon = "not known here" if account["epsilon"] is None else f"{account['epsilon']:.3g}"
    of = f" of {budget:g}" if budget is not None else ""
    lines = [f"ε {epsilon}{of} at δ {account['delta']:g} for each {account['unit']}"]
    lines += [f"  {name:<12} {account[name]}" for name in ("mechanism", "adjacency", "accountant")]
    lines += [f"  run {one['run']}: ε {one['epsilon']:.3g}" for one in account.get("runs", [])]
    lines += [
        f"  site {name}: ε {epsilon:.3g}" for name, epsilon in account.get("sites", {}).items() if epsilon is not None
    ]
    return "\n".join([*lines, "  assumed", *(f"    {one}" for one in account["assumptions"])])
