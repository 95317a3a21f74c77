"""The section `data`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core_training.parts.section import PositiveInt, Section

Reasoning = Literal["keep", "drop", "last"]


class Data(Section):
    """Training and evaluation records."""

    train: str | list[str] | None = Field(
        None,
        description="File, glob, folder, name on the hub that is in this machine's cache, or a list of them: .jsonl "
        ".json .csv .tsv .txt (also .gz), .xlsx .parquet .arrow; `FOLDER/dataset_info.json:NAME` is a data set of "
        "LLaMA-Factory's, `NAME[:1000]` its first thousand records. "
        "In a real federation: the data set's name, which each site maps to files of its own in `site.yaml`.",
    )
    eval: str | list[str] | None = Field(None, description="Evaluation files; without it a part of `train` is kept.")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of records kept for evaluation, chosen by a stable hash of each record."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="The stage's column name: the name it has in the files, where they differ."
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="A record that does not fit the stage or the model ends the run, or is skipped and counted. A file "
        "that is damaged ends it all the same.",
    )
    unknown: Literal["stop", "warn"] = Field(
        "stop",
        description="What says something in a record and cannot be used (images, a template's settings) ends the run, "
        "or is left out and counted.",
    )
    reasoning: Reasoning = Field(
        "keep",
        description="Thoughts before the assistant's words (`reasoning_content`, `<think>…</think>`): kept, left out, "
        "or kept in the last turn alone, which is what the templates of many thinking models print.",
    )
    max_samples: PositiveInt | None = Field(
        None, description="Records to read of each data set (a file, or all its numbered files), from the first."
    )
    mix: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict,
        description="The share that each source (a file's name without endings) has of the training records: as many "
        "are kept as can be without one twice. Unset: all records.",
    )
    loss_on: Literal["answers", "last_answer", "all"] = Field(
        "answers",
        description="What is learnt of a conversation in stage sft: each of the assistant's turns, the last of them "
        "alone, or all of it, the user's words and the template's too.",
    )
    cache: str | None = Field(
        None,
        description="Folder in which tokenised records are kept, by digest: they are tokenised once, and need not fit "
        "in memory. Unset: in memory, so that no copy of the records is left on disk.",
    )
