"""What a run of a sweep gave, and the folder that remembers it.

    runs/<name>/points/<hash of all settings>.json     written whole or not at all; read back by field and type

A file counts when it has every field, belongs to those settings, and comes from the same code: then a second call need
not run the point again.
"""

from __future__ import annotations

import ast
import hashlib
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

import launch.recipes
import pipeline
from launch.sweep.grid import Point

__all__ = ["CutQuality", "Outcome", "Store", "code_of", "finite", "followed"]


class CutQuality(msgspec.Struct, frozen=True, kw_only=True):
    """The synthetic gradients of one cut: medians over the sampled batches of the second half of the run.

    Attributes:
        stage: index of the stage below the cut.
        samples: batches that were compared.
        cosine: between the gradients of the stage's weights under the synthetic and the true gradient.
        norm_ratio: norm of the former over norm of the latter.
        error: |s - g|^2 / |g|^2 at the cut; None: not finite.
    """

    stage: int
    samples: int
    cosine: float
    norm_ratio: float
    error: float | None


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One run.

    Attributes:
        loss: held-out loss, or without held-out data the mean training loss of the last tenth; None: not finite.
        accuracy: held-out accuracy, if the recipe counts right answers.
        train_loss: mean of the last tenth of the batches; None: not finite.
        batches: trained; fewer than planned where ``until`` ended the run.
        reached: after how many updates ``until`` was met.
        evaluations: (updates, loss, accuracy) of every pass over the held-out data.
        quality: of every cut; empty where there is no DNI.
        flops: operations of every stage for a batch, by what they are for (``pipeline.run.flops.StageFlops``).
        seconds: how long it took.
        diverged: what was said when the run ended itself because numbers were no longer finite, or ran away.
    """

    loss: float | None = None
    accuracy: float | None = None
    train_loss: float | None = None
    batches: int = 0
    reached: int | None = None
    evaluations: tuple[tuple[int, float | None, float | None], ...] = ()
    quality: tuple[CutQuality, ...] = ()
    flops: tuple[dict[str, float], ...] = ()
    seconds: float = 0.0
    diverged: str | None = None

    @property
    def dni_share(self) -> float | None:
        """Operations of the DNIs over those of the stages that have one; None: there is none, or nothing counts."""
        pairs = [(flops["dni"], sum(flops.values()) - flops["dni"]) for flops in self.flops if flops["dni"]]
        rest = sum(rest for _, rest in pairs)
        return sum(dni for dni, _ in pairs) / rest if rest else None


def finite(value: float) -> float | None:
    """What JSON can hold: infinities and what is no number become null."""
    return value if math.isfinite(value) else None


class _File(msgspec.Struct, frozen=True):
    """A point's file."""

    key: str
    code: str
    recipe: str
    options: dict[str, str]
    plan: dict[str, Any]
    outcome: Outcome


class Store:
    """The finished points of a sweep.

    Args:
        folder: of the sweep; made when the first point is put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "points"

    def find(self, point: Point) -> Outcome | None:
        """What the point gave; None: it was not run, not to the end, or by other code."""
        file = self._read(point)
        return file.outcome if file is not None and file.code == code_of(point.source.name) else None

    def outdated(self, point: Point) -> bool:
        """Whether the point was run by other code."""
        file = self._read(point)
        return file is not None and file.code != code_of(point.source.name)

    def put(self, point: Point, outcome: Outcome) -> None:
        """Write the point's file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name, options = point.source.name, {name: str(value) for name, value in point.source.options}
        file = _File(point.key, code_of(name), name, options, point.plan.as_dict(), outcome)
        half = self.folder / f".{point.key}.{os.getpid()}"
        half.write_bytes(msgspec.json.format(msgspec.json.encode(file), indent=2) + b"\n")
        half.replace(self._path(point))

    def _path(self, point: Point) -> Path:
        return self.folder / f"{point.key}.json"

    def _read(self, point: Point) -> _File | None:
        try:
            file = msgspec.json.decode(self._path(point).read_bytes(), type=_File)
        except (FileNotFoundError, msgspec.DecodeError):  # or ValidationError, which is one
            return None
        return file if file.key == point.key else None


@cache
def code_of(recipe: str) -> str:
    """Hash of the code that training follows: pipeline, the built-in recipes, the recipe's own file.

    Comments and docstrings do not count.
    """
    digest = hashlib.blake2b(digest_size=12)
    for file in followed(recipe):
        digest.update(file.name.encode())
        digest.update(_without_words(ast.parse(file.read_bytes())).encode())
    return digest.hexdigest()


def followed(recipe: str) -> list[Path]:
    """The files of that code."""
    packages = (Path(path) for package in (pipeline, launch.recipes) for path in package.__path__)
    files = sorted(file for folder in packages for file in folder.rglob("*.py"))
    return [*files, *([Path(recipe)] if recipe.endswith(".py") else [])]


def _without_words(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
