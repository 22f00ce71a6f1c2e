"""What a run of a sweep gave, and the folder that remembers it.

``runs/<name>/points/<hash of all settings>.json`` counts when it has every field, belongs to those settings, and comes
from the same code: then a second call need not run the point again.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

import launch.recipes
import pipeline
from launch.results.dni_quality import StageQuality
from launch.sweep.grid import Point
from workers.files import replacing

__all__ = ["Outcome", "Store", "followed"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        loss: held-out loss, or without held-out data the mean training loss of the last tenth; None: not finite.
        train_loss: mean of the last tenth of the batches; None: not finite.
        batches: fewer than planned where ``until`` ended the run.
        reached: after how many updates ``until`` was met.
        evaluations: (updates, loss, accuracy) of every pass over the held-out data.
        quality: of the synthetic gradients at every cut.
        flops: operations of every stage for a batch, by what they are for (``pipeline.run.flops.StageFlops``).
        diverged: what was said when the run ended itself because numbers were no longer finite, or ran away.
    """

    loss: float | None = None
    accuracy: float | None = None
    train_loss: float | None = None
    batches: int = 0
    reached: int | None = None
    evaluations: tuple[tuple[int, float | None, float | None], ...] = ()
    quality: tuple[StageQuality, ...] = ()
    flops: tuple[dict[str, float], ...] = ()
    seconds: float = 0.0
    diverged: str | None = None

    @property
    def dni_share(self) -> float | None:
        """Operations of the DNIs over those of the stages that have one; None: there is none, or nothing counts."""
        pairs = [(flops["dni"], sum(flops.values()) - flops["dni"]) for flops in self.flops if flops["dni"]]
        rest = sum(rest for _, rest in pairs)
        return sum(dni for dni, _ in pairs) / rest if rest else None


class _File(msgspec.Struct, frozen=True):
    key: str
    code: str
    recipe: str
    options: dict[str, str]
    plan: dict[str, Any]
    outcome: Outcome


class Store:
    """The finished points of a sweep; the folder is made when the first one is put."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "points"

    def find(self, point: Point) -> Outcome | None:
        """What the point gave; None: it was not run, not to the end, or by other code."""
        file = self._read(point)
        return file.outcome if file is not None and file.code == _code_of(point.source.name) else None

    def outdated(self, point: Point) -> bool:
        """Whether the point was run by other code."""
        file = self._read(point)
        return file is not None and file.code != _code_of(point.source.name)

    def put(self, point: Point, outcome: Outcome) -> None:
        """Write the point's file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name, options = point.source.name, {name: str(value) for name, value in point.source.options}
        file = _File(point.key, _code_of(name), name, options, point.plan.as_dict(), outcome)
        with replacing(self.folder / f"{point.key}.json") as draft:
            draft.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")

    def _read(self, point: Point) -> _File | None:
        try:
            file = msgspec.json.decode((self.folder / f"{point.key}.json").read_bytes(), type=_File)
        except (FileNotFoundError, msgspec.DecodeError):  # or ValidationError, which is one
            return None
        return file if file.key == point.key else None


@cache
def _code_of(recipe: str) -> str:
    """Hash of the code that training follows; comments and docstrings do not count."""
    digest = hashlib.blake2b(digest_size=12)
    for file in followed(recipe):
        digest.update(file.name.encode())
        digest.update(ast.dump(_WithoutTexts().visit(ast.parse(file.read_bytes()))).encode())
    return digest.hexdigest()


def followed(recipe: str) -> list[Path]:
    """The files that training follows: pipeline, the built-in recipes, the recipe's own file."""
    packages = (Path(path) for package in (pipeline, launch.recipes) for path in package.__path__)
    files = sorted(file for folder in packages for file in folder.rglob("*.py"))
    return [*files, *([Path(recipe)] if recipe.endswith(".py") else [])]


class _WithoutTexts(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node
