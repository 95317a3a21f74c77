"""pydantic keeps a model's values in its `__dict__`, where core_training/recipe settles some of them."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from tests.contracts.leaning import leans


class Settled(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    codec: str | None = None
    clip: float | None = None

    @model_validator(mode="after")
    def _settle(self) -> Self:
        self.__dict__.update(codec=self.codec or "fp32")
        return self


@leans("core_training/recipe/combinations_of_rounds.py")
def test_what_a_validator_writes_there_is_the_models_value_in_every_way_to_look_at_it() -> None:
    settled, said = Settled(), Settled(codec="fp32")
    assert settled.codec == "fp32"
    assert settled.model_dump() == said.model_dump() == {"codec": "fp32", "clip": None}
    assert settled.model_dump_json() == said.model_dump_json()
    assert settled.model_copy(update={"clip": 1.0}).codec == "fp32"
    assert Settled.model_validate(settled.model_dump()).codec == "fp32"
    assert {name: getattr(settled, name) for name in Settled.model_fields} == {"codec": "fp32", "clip": None}
