"""`python -m examples.demo` (or `make demo`): the demo as a program."""

from __future__ import annotations

import sys

import core_training.foundation.environment  # noqa: F401 - before anything that might call home
from core_training.foundation.errors import FedloomError, Interrupted


def main() -> int:
    from examples.demo.findings import publish, show
    from examples.demo.story import tell

    try:
        findings = tell()
        publish(findings)
        show(findings)
    except (KeyboardInterrupt, Interrupted):
        print("stopped; `make demo` starts again from the beginning", file=sys.stderr)
        return 130
    except FedloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
