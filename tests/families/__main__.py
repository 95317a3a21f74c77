"""`python -m tests.families [NAME …]`: every cell of families, as a page on standard output (docs/families.md).

Without a name: all decoders of transformers, in about half an hour; `sample` stands for the suite's.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.families.finding import Found, walk_through
from tests.families.test_families import SAMPLE
from tests.families.walk import WALKS

_PROCESSES = 2


def main() -> None:
    """Walk through the families of the command line, or all of them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = sys.argv[1:] or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "llama-rope"})
    if names == ["sample"]:
        names = sorted(SAMPLE)
    found, not_built = list[Found](), list[str]()
    with ProcessPoolExecutor(_PROCESSES, get_context("spawn")) as pool:
        for one in pool.map(walk_through, names):
            sys.stderr.write(f"{one.name if isinstance(one, Found) else one}\n")
            if isinstance(one, Found):
                found.append(one)
            else:
                not_built.append(one)
    sys.stdout.write(_page(found, not_built))


def _page(found: list[Found], not_built: list[str]) -> str:
    right = sum(outcome == "right" for one in found for outcome in one.outcomes.values())
    wrong = sum(outcome.startswith("**") for one in found for outcome in one.outcomes.values())
    cells = sum(len(one.outcomes) for one in found)
    lines = [
        _HEAD.format(
            families=len(found), cells=cells, right=right, refused=cells - right - wrong, wrong=wrong, each=len(WALKS)
        ),
        "| family | cells right | LoRA adapts | in four bits | packs | context | refused |",
        "|---|---|---|---|---|---|---|",
        *(one.row() for one in found),
    ]
    if not_built:
        lines += [
            "\n## Not built\n",
            "What transformers lists as decoders, and why it could not be built:\n",
            *(f"- {one}" for one in not_built),
        ]
    return "\n".join(lines) + "\n"


_HEAD = """\
# Model families

Decoders of transformers, each built with a few thousand weights, in every cell (`tests/families/walk.py` says what is
asked). {families} families × {each} cells: {right} of {cells} right, {refused} refused with a reason, {wrong} wrong.
`make families` asks all that become so small, `python -m tests.families sample` those in the suite.

- **LoRA adapts**, **in four bits**: the share of the layers' weights that `all-linear` and QLoRA reach. What is left
  out are routers, layers whose weights a model's own code reads, and tensors that are neither layers nor experts; a run
  says so when it starts.
- **packs**: several examples can share a row; otherwise each has one of its own, and a run says so.
- **context**: whether the configuration states how many tokens the model takes.
"""

if __name__ == "__main__":
    main()
