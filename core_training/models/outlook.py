"""`python -m core_training.models.outlook < RECIPE`: what a tuning mode reaches of a recipe's model, from its shapes.

`fedloom recipe check` starts it where the model is on this machine: the libraries stay out of the command itself. It
answers in a line of JSON, `{"reach": [...]}`, or `{"refused": "..."}` where recipe and model do not go together.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import core_training.foundation.environment as environment
from core_training.foundation.errors import InputError
from core_training.models.libraries import own_the_process, settle_libraries

if TYPE_CHECKING:
    from core_training.recipe.schema import Recipe


def main() -> None:
    """Answer for the recipe on standard input."""
    own_the_process()
    environment.silence_libraries()
    settle_libraries()
    from core_training.recipe.reading import parse_recipe

    logging.disable(logging.WARNING)
    print(json.dumps(outlook(parse_recipe(sys.stdin.read()))))  # noqa: T201 - to the process that asked


def outlook(recipe: Recipe) -> dict[str, Any]:
    """What is answered. Raises InputError for a model that cannot be looked at."""
    from core_training.models.loading import base_folder
    from core_training.models.outline import bare_model
    from core_training.tuning.base import load_tuning

    model = bare_model(base_folder(recipe))
    try:
        return {"reach": [{**asdict(reach), "said": str(reach)} for reach in load_tuning(recipe).reach(model)]}
    except InputError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    main()
