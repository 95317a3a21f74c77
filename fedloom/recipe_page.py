"""The reference page of the recipe, made from the schema."""

from __future__ import annotations

import types
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from core_training.recipe.schema import Recipe


def recipe_page() -> str:
    """`docs/recipe.md`, generated so that it cannot differ from what is checked."""
    lines = [
        "# The recipe",
        "",
        "One YAML file says what to train, how, and where. This page is made from the schema by `make docs`.",
        "Paths are relative to the folder a command is run in. `KEY=VALUE` after the recipe's name overrides a key:",
        "`fedloom train recipe.yaml training.learning_rate=1e-4`. Unknown keys are errors.",
    ]
    _section(Recipe, "", lines)
    return "\n".join(lines) + "\n"


def _section(model: type[BaseModel], prefix: str, lines: list[str]) -> None:
    plain = {name: field for name, field in model.model_fields.items() if not _is_section(field.annotation)}
    if plain:
        lines += ["", f"## `{prefix}`" if prefix else "## Top level", ""]
        if prefix:
            lines += [" ".join((model.__doc__ or "").split()), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in plain.items():
            meaning = (field.description or _TOP_LEVEL.get(name, "")).replace("|", "\\|")
            lines.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {meaning} |")
    for name, field in model.model_fields.items():
        for section in filter(_is_section, (field.annotation, *get_args(field.annotation))):
            _section(section, f"{prefix}.{name}" if prefix else name, lines)


_TOP_LEVEL = {"stage": "What the model is trained for."}


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if _is_section(annotation):
        return "its keys below"
    if origin is Literal:
        return " \\| ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " \\| ".join(_type(part) for part in get_args(annotation))
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(_type, get_args(annotation)))}]"
    if origin is not None:
        return _type(get_args(annotation)[0])
    return "null" if annotation is type(None) else str(annotation.__name__)


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "required" if field.default_factory is None else "none"
    return "–" if field.default is None else f"`{field.default}`"
