"""The section `simulation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core_training.parts.section import PositiveInt, Section


class Simulation(Section):
    """The sites of `fedloom simulate`: given one by one, or made by partition of `data.train`."""

    sites: list[str] | dict[str, str] | None = Field(
        None, description="A file for each site (its name is the file's), or `name: file`."
    )
    partition: Literal["iid", "dirichlet", "size_skew", "natural"] | None = Field(
        None, description="How `data.train` is divided: evenly, by label skew, by size skew, or by a column's values."
    )
    count: PositiveInt | None = Field(None, description="Sites to make (not for `natural`).")
    by: str | None = Field(None, description="The column of `dirichlet` and `natural`.")
    alpha: Annotated[float, Field(gt=0)] = Field(0.5, description="Dirichlet concentration: smaller is more uneven.")
    engine: Literal["inprocess", "ray"] = Field("inprocess", description="inprocess | ray (extra `simulation`).")
