"""`python -m evaluation.bridges.environments NAME…`: make the environments of those names that are not there yet."""

from __future__ import annotations

import sys

import core_training.foundation.environment  # noqa: F401 - which says whether anything may be fetched
from core_training.foundation.errors import FedloomError
from evaluation.bridges import evidently, promptfoo

KINDS = {kind.name: kind for kind in (evidently.ENVIRONMENT, promptfoo.ENVIRONMENT)}


def main(names: list[str]) -> int:
    """The exit code: 2 for a name that is none."""
    if not names or not set(names) <= KINDS.keys():
        sys.stderr.write(f"usage: python -m evaluation.bridges.environments NAME…, of {', '.join(KINDS)}\n")
        return 2
    for name in names:
        try:
            folder = KINDS[name].ready(None, lambda words: print(words, file=sys.stderr))  # noqa: T201 - a command
        except FedloomError as error:
            sys.stderr.write(f"{error}\n")
            return error.exit_code
        sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
