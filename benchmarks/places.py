"""Where the benchmarks find data and model, and the recipe they all start from: the MedQuAD example's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from core_training.foundation.errors import InputError
from core_training.recipe.reading import load_recipe
from core_training.recipe.schema import Recipe

EXAMPLES = Path(__file__).parents[1] / "examples" / "medquad"
OUTPUT = Path("runs/bench")


@dataclass(frozen=True)
class Places:
    """The folders given on the command line: MedQuAD's files, and a model folder."""

    data: Path
    model: Path

    @property
    def sites(self) -> dict[str, Path]:
        """MedQuAD's sites and their files. Raises InputError when there are none."""
        files = sorted(self.data.glob("*.jsonl.gz"))
        if not files:
            raise InputError(f"--data: {self.data} holds no *.jsonl.gz; name MedQuAD's folder")
        return {path.name.removesuffix(".jsonl.gz"): path for path in files}

    def recipe(self, *overrides: str, name: str = "federated") -> Recipe:
        """The MedQuAD example's recipe on these folders."""
        files = f"[{', '.join(map(str, self.sites.values()))}]"
        here = (f"model.name_or_path={self.model}", f"data.train={files}", f"simulation.sites={files}")
        return load_recipe(EXAMPLES / f"{name}.yaml", [*here, *overrides])
