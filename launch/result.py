"""What a run leaves: figures, files, and the trained weights under the unsplit model's names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.measurements import Measured, measure, warmup_of
from pipeline.resolve import Resolved
from pipeline.spans import Spans
from workers.records import Finished, Scored

__all__ = ["SCHEMA", "Result"]

SCHEMA = 1


@dataclass
class Result:
    """One finished run.

    Attributes:
        resolved: what was run.
        run_dir: its folder.
        seconds: wall time of the training, from the first batch on, evaluations included.
        losses: training loss of every batch.
        scores: every pass over the held-out batches.
        finished: what each worker reported at its end.
    """

    resolved: Resolved
    run_dir: Path
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    finished: dict[int, Finished] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The last held-out loss, or without held-out data the mean training loss of the last tenth of the batches."""
        if self.scores:
            return self.scores[-1].loss
        return float(np.mean(self.losses[-max(1, len(self.losses) // 10) :]))

    @property
    def accuracy(self) -> float | None:
        """The last held-out accuracy, if the recipe counts right answers."""
        return self.scores[-1].accuracy if self.scores else None

    @cached_property
    def spans(self) -> list[Spans]:
        """What every worker did when; empty for a run without spans."""
        return [
            Spans(np.load(self.run_dir / "spans" / f"stage-{k}.npy", allow_pickle=False))
            for k in range(self.resolved.plan.stages if self.resolved.plan.spans else 0)
        ]

    @cached_property
    def measured(self) -> Measured | None:
        """Figures from the spans, the warm-up left out; None for a run without spans, or of one batch."""
        return measure(self.spans, warmup_of(self.resolved.steps)) if self.spans and self.resolved.steps > 1 else None

    @property
    def samples_per_s(self) -> float | None:
        """Throughput in the steady state, the warm-up left out; None for a run of one batch."""
        window_ns = self.finished[self.resolved.plan.stages - 1].window_ns
        if window_ns is None:
            return None
        counted = self.resolved.steps - warmup_of(self.resolved.steps)
        return counted * self.resolved.batch_shape[0] * 1e9 / (window_ns[1] - window_ns[0])

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the whole network under the unsplit model's names."""
        return load_file(self.run_dir / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer states: ``<parameter>.<key>``."""
        return load_file(self.run_dir / "optimizer.safetensors")

    def export(self, path: str | Path) -> Path:
        """Write the weights as a safetensors file that loads into the plain PyTorch model, strict.

        ``model.load_state_dict(safetensors.torch.load_file(path))``
        """
        path = Path(path)
        save_file(self.state_tensors(), path)
        return path

    def summary(self) -> str:
        """A few lines: what was run, how well it learned, how fast, and where it lies."""
        plan = self.resolved.plan
        steps, rows = self.resolved.steps, self.resolved.batch_shape[0]
        speed = f"{self.samples_per_s:,.0f} samples/s" if self.samples_per_s is not None else "one batch only"
        learned = f"loss {self.loss:.4f}"
        if self.accuracy is not None:
            learned += f", accuracy {self.accuracy:.2%}"
        return (
            f"{plan.mode}, {plan.stages} {'stage' if plan.stages == 1 else 'stages'}, {steps:,} batches of {rows}: "
            f"{learned}\n{speed}, {self.seconds:.1f} s, in {self.run_dir}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields of result.json."""
        plan = self.resolved.plan
        return {
            "schema": SCHEMA,
            "mode": plan.mode,
            "stages": plan.stages,
            "steps": self.resolved.steps,
            "samples": self.resolved.steps * self.resolved.batch_shape[0],
            "loss": self.loss,
            "accuracy": self.accuracy,
            "samples_per_s": self.samples_per_s,
            "seconds": self.seconds,
            "run": str(self.run_dir),
            "sizes": list(self.resolved.sizes),
            "dropped_targets": [self.finished[k].dropped for k in sorted(self.finished)],
            "peak_memory_bytes": [self.finished[k].peak_memory_bytes for k in sorted(self.finished)],
        }

    def write(self, path: Path) -> None:
        """Write result.json there."""
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n")
