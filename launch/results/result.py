"""What a run leaves: figures, files, and the trained weights under the unsplit model's names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from launch.results.dni_quality import StageQuality, summarised
from launch.results.run_folder import read_spans
from pipeline.metrics.measurements import Measured, measure
from pipeline.metrics.spans import Spans
from pipeline.plan.goal import Reached
from pipeline.run.resolved import Resolved
from workers.files import write_tensors
from workers.telemetry.records import Finished, Judged, Scored, Switched

__all__ = ["SCHEMA", "Result"]

SCHEMA = 1
_FIGURES = ("steps", "samples", "loss", "accuracy", "samples_per_s", "seconds")  # of result.json, as they are


@dataclass(repr=False)
class Result:
    """One finished run.

    Attributes:
        seconds: wall time of the training, from the first batch on, evaluations included.
        losses: training loss of every step, the mean over its batches.
        scores: every pass over the held-out batches.
        finished: what each worker reported at its end, by its number.
        judged: quality of the synthetic gradients of every sampled batch, by ``plan.quality_every``.
        switches: when a stage locked or unlocked, as word of it came.
        met: the first pass over the held-out batches that met ``plan.until``; None: none did, or not asked for.
        launcher: who started the workers, ``local`` or ``torchrun``.
    """

    resolved: Resolved
    run_dir: Path
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    finished: dict[int, Finished] = field(default_factory=dict)
    judged: list[Judged] = field(default_factory=list)
    switches: list[Switched] = field(default_factory=list)
    met: Scored | None = None
    launcher: str = "local"

    @property
    def steps(self) -> int:
        """Steps that all replicas made; fewer than planned when ``plan.until`` ended the run."""
        return len(self.losses)

    @property
    def samples(self) -> int:
        """Rows that were trained on."""
        return sum(done.updated for done in self._last_stages) * self.resolved.batch_shape[0]

    @property
    def _last_stages(self) -> list[Finished]:
        return [done for done in self.finished.values() if done.stage == self.resolved.plan.stages - 1]

    @property
    def start_ns(self) -> int:
        """When the first worker began, on the common clock."""
        return min(done.begin_ns for done in self.finished.values())

    @property
    def reached(self) -> Reached | None:
        """When ``plan.until`` was met. The batches that were under way by then were trained as well (``steps``)."""
        if (met := self.met) is None:
            return None
        return Reached(met.updates, (met.time_ns - self.start_ns) * 1e-9, met.loss, met.accuracy)

    @property
    def quality(self) -> list[StageQuality]:
        """How good the synthetic gradients were, per stage; empty where nothing was sampled."""
        return summarised(self.judged, self.steps)

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
        return read_spans(self.run_dir, self.resolved.plan.replicas) if self.resolved.plan.spans else []

    @cached_property
    def measured(self) -> Measured | None:
        """Figures from the spans, the warm-up left out; None for a run without spans, or of one batch."""
        if not self.spans or self.steps < 2:
            return None
        sent = [(self.finished[k].down_bytes, self.finished[k].up_bytes) for k in sorted(self.finished)]
        return measure(self.spans, self.resolved.warmup, sent, self._window_ns, self.resolved.plan.replicas)

    @property
    def samples_per_s(self) -> float | None:
        """Throughput in the steady state, the warm-up left out; None for a run of one batch."""
        if (window_ns := self._window_ns) is None:
            return None
        counted = self.samples - self.resolved.warmup * self.resolved.step_rows
        return counted * 1e9 / (window_ns[1] - window_ns[0])

    @property
    def _window_ns(self) -> tuple[int, int] | None:
        """From the end of the first replica's warm-up to the end of the last one's last batch."""
        windows = [done.window_ns for done in self._last_stages if done.window_ns is not None]
        if len(windows) < self.resolved.plan.replicas:
            return None
        return min(begin for begin, _ in windows), max(end for _, end in windows)

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the whole network under the unsplit model's names."""
        return load_file(self.run_dir / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Optimizer states: ``<parameter>.<key>``."""
        return load_file(self.run_dir / "optimizer.safetensors")

    def export(self, path: str | Path) -> Path:
        """Write the weights for ``model.load_state_dict(safetensors.torch.load_file(path))`` of the plain model."""
        path = Path(path)
        write_tensors(self.state_tensors(), path)
        return path

    def __repr__(self) -> str:
        """The summary: the fields are thousands of numbers."""
        return f"Result({self.summary()})" if self.finished else f"Result(of a run that goes on in {self.run_dir})"

    def summary(self) -> str:
        """A few lines: what was run, how well it learned, how fast, and where it lies."""
        plan, rows = self.resolved.plan, self.resolved.batch_shape[0]
        stages = f"{plan.stages} {'stage' if plan.stages == 1 else 'stages'}"
        each = f"{rows}" if plan.replicas == 1 else f"{rows} in each of {plan.replicas} replicas"
        speed = f"{self.samples_per_s:,.0f} samples/s" if self.samples_per_s is not None else "one batch only"
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
        goal = ""
        if (reached := self.reached) is not None:
            over = self.steps - reached.updates
            goal = f"\n{plan.goal} reached after {reached.updates:,} batches, {reached.seconds:.2f} s"
            goal += f" ({over:,} more {'was' if over == 1 else 'were'} under way)" if over else ""
        elif plan.goal is not None:
            goal = f"\n{plan.goal} was not reached"
        return (
            f"{plan.mode}, {stages}, {self.steps:,} batches of {each}: "
            f"loss {self.loss:.4f}{accuracy}{goal}\n{speed}, {self.seconds:.1f} s, in {self.run_dir}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The fields of result.json."""
        plan, reached, measured = self.resolved.plan, self.reached, self.measured
        workers = [self.finished[k] for k in sorted(self.finished)]
        return {
            "schema": SCHEMA,
            "mode": plan.mode,
            "launcher": self.launcher,
            "stages": plan.stages,
            "replicas": plan.replicas,
            **{name: getattr(self, name) for name in _FIGURES},
            "until_s": reached.seconds if reached else None,
            "until_samples": reached.updates * self.resolved.step_rows if reached else None,
            "run": str(self.run_dir),
            "sizes": list(self.resolved.sizes),
            "dropped_targets": [done.dropped for done in workers],
            "peak_memory_bytes": [done.peak_memory_bytes for done in workers],
            "queue_depth": measured.queue_depth if measured else None,
            "bytes_moved": measured.bytes_moved if measured else None,
            "quality": [asdict(each) for each in self.quality] or None,
            "switches": [msgspec.structs.asdict(each) for each in self.switches] or None,
        }
