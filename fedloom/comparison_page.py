"""The report on a comparison: ratings, wins, what judges are swayed by, and pairs to look at."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_training.foundation.durable import commit_file
from fedloom.page import image, page, table
from fedloom.pictures import COLOURS, new_figure

if TYPE_CHECKING:
    from evaluation.pairs.contest import Compared
    from evaluation.pairs.pairwise import Outcome, Shown

REPORT = "report.html"
RATING_COLUMNS = ("model", "rating", "95 %", "wins", "losses", "ties", "not judged", "won", "tokens")
_EXAMPLES = 8
_LONGEST = 1500
"""Letters of a text that an example shows."""


def write_report(found: Compared) -> Path:
    """Write the report beside the verdicts. Raises RunError when the disk refuses."""
    target = found.contest.folder / REPORT
    commit_file(target, _page(found).encode())
    return target


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Each model's name for people: the last parts of its path that tell it from the others."""
    for depth in range(1, 1 + max(len(Path(name).parts) or 1 for name in models)):
        short = {name: "/".join(Path(name).parts[-depth:]) or name for name in models}
        if len(set(short.values())) == len(models):
            return short
    return {name: name for name in models}


def _page(found: Compared) -> str:
    document = found.document
    names = short_names([one["model"] for one in document["models"]])
    title = f"{', '.join(names.values())} compared on {document['task']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{document['prompts']} prompts, judged by {html.escape(document['judge'])}, each pair in both orders; "
        "where a judge says otherwise of the other order it is a tie.</p>",
        table(RATING_COLUMNS, rating_rows(document)),
    ]
    if all(one["rating"] is not None for one in document["models"]):
        parts.append(image(_picture(document, names), "Ratings with their intervals"))
    parts += ["<h2>Pairs</h2>", _pairs(document, names), "<h2>The judge</h2>", _judge(document)]
    if len(names) > 2:
        parts += ["<h2>Wins, a tie being half</h2>", _matrix(document, names)]
    parts += [f"<p>{html.escape(note)}</p>" for note in document["notes"]]
    examples = _chosen(found.outcomes)
    if examples:
        parts.append("<h2>Pairs with the largest margins</h2>" + _examples(examples, names))
    parts.append(
        "<p>Ratings: Bradley and Terry's, 400 points being odds of ten to one, 1000 the models' mean; intervals by "
        f"bootstrap over prompts; p by the sign test. Every look: <code>verdicts.jsonl</code>; pairs to train on: "
        f"<code>{html.escape(document['preferences']['file'])}</code>.</p>"
    )
    return page(title, parts)


def rating_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model, the best first."""
    names = short_names([one["model"] for one in document["models"]])
    order = sorted(document["models"], key=lambda one: -(one["rating"] or 0.0))
    return [
        [
            names[one["model"]],
            _shown(one["rating"], 0),
            f"{_shown(one['low'], 0)} to {_shown(one['high'], 0)}",
            *(str(one[key]) for key in ("wins", "losses", "ties", "unjudged")),
            _percent(one["win_rate"]),
            _shown(one["answer_tokens"], 1),
        ]
        for one in order
    ]


def pair_words(document: Mapping[str, Any]) -> list[str]:
    """A line for each two models."""
    names = short_names([one["model"] for one in document["models"]])
    return [
        f"{names[one['model']]} against {names[one['against']]}: {_percent(one['share'])} "
        f"[{_percent(one['low'])}, {_percent(one['high'])}] of {one['wins'] + one['losses'] + one['ties']}, "
        f"p {_shown(one['p'], 4)}, by Holm {_shown(one['p_holm'], 4)}"
        for one in document["pairs"]
    ]


def _pairs(document: Mapping[str, Any], names: Mapping[str, str]) -> str:
    columns = ["", "wins", "losses", "ties", "not judged", "won", "95 %", "p", "p (Holm)", "tokens more"]
    rows = [
        [
            f"{names[one['model']]} − {names[one['against']]}",
            *(str(one[key]) for key in ("wins", "losses", "ties", "unjudged")),
            _percent(one["share"]),
            f"{_percent(one['low'])} to {_percent(one['high'])}",
            _shown(one["p"], 4),
            _shown(one["p_holm"], 4),
            _shown(one["length_difference"], 1),
        ]
        for one in document["pairs"]
    ]
    return table(columns, rows)


def _judge(document: Mapping[str, Any]) -> str:
    rows = [
        ["position bias (0 none, 1 always the first)", _shown(document["position_bias"], 3)],
        ["ties, of the judged pairs", _percent(document["tie_share"])],
        ["pairs that were not judged", str(document["unjudged"])],
        ["pairs of the same answer twice (ties)", str(document["identical"])],
        ["tokens that the better answer has more", _shown(document["length"]["winner_minus_loser"], 1)],
        ["pairs that the longer answer won", _percent(document["length"]["longer_wins"])],
    ]
    if (found := document["agreement"]) is not None:
        rows += [
            [f"Cohen's κ, {' and '.join(one['annotators'])} ({one['pairs']} pairs)", _shown(one["kappa"], 3)]
            for one in found["cohen"]
        ]
        if (several := found["fleiss"]) is not None:
            rows.append(
                [f"Fleiss' κ of {several['annotators']} ({several['pairs']} pairs)", _shown(several["kappa"], 3)]
            )
    return table(["", ""], rows)


def _matrix(document: Mapping[str, Any], names: Mapping[str, str]) -> str:
    own = list(names.values())
    rows = [
        [name, *("–" if i == j else f"{value:g}" for j, value in enumerate(row))]
        for i, (name, row) in enumerate(zip(own, document["win_matrix"], strict=True))
    ]
    return table(["over", *own], rows)


def _picture(document: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    order = sorted(document["models"], key=lambda one: one["rating"])
    figure = new_figure(6.5, 0.6 * len(order) + 1.2)
    axes = figure.subplots()
    for place, one in enumerate(order):
        low = one["rating"] if one["low"] is None else one["low"]
        high = one["rating"] if one["high"] is None else one["high"]
        colour = COLOURS[place % len(COLOURS)]
        axes.plot([low, high], [place, place], color=colour, linewidth=2)
        axes.plot([one["rating"]], [place], "o", color=colour)
    axes.set_yticks(range(len(order)), [names[one["model"]] for one in order])
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlabel("rating")
    return figure


def _chosen(outcomes: Sequence[tuple[Shown, Outcome]]) -> list[tuple[Shown, Outcome]]:
    won = [one for one in outcomes if one[1].share in (0.0, 1.0)]
    return sorted(won, key=lambda one: -one[1].margin)[:_EXAMPLES]


_CELL = 'style="white-space: pre-wrap; text-align: left; vertical-align: top; min-width: 12rem; max-width: 28rem"'


def _examples(chosen: Sequence[tuple[Shown, Outcome]], names: Mapping[str, str]) -> str:
    head = "".join(f"<th>{html.escape(one)}</th>" for one in ("margin", "prompt", "the better answer", "the worse one"))
    body = []
    for shown, one in chosen:
        sides = [(shown.first, shown.texts[0]), (shown.second, shown.texts[1])]
        better, worse = sides if one.share == 1.0 else sides[::-1]
        texts = [shown.item.question, *(f"{names[model]}:\n{text}" for model, text in (better, worse))]
        cells = "".join(f"<td {_CELL}>{html.escape(_short(text))}</td>" for text in texts)
        body.append(f"<tr><td>{one.margin:.3g}</td>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
