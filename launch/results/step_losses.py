"""The training losses of a run from what the last stages of its replicas report, each at its own pace."""

from __future__ import annotations

from workers.telemetry.records import Loss

__all__ = ["StepLosses"]


class StepLosses:
    """Puts the losses of the replicas together: the loss of a step is the mean over their batches."""

    def __init__(self, replicas: int) -> None:
        self._waiting: list[list[float]] = [[] for _ in range(replicas)]

    def take(self, record: Loss) -> list[float]:
        """Take in what one replica reports; gives the losses of the steps that all replicas have now made."""
        self._waiting[record.replica] += record.losses
        count = min(map(len, self._waiting))
        steps = zip(*(losses[:count] for losses in self._waiting), strict=True)
        complete = [sum(each) / len(each) for each in steps]
        self._waiting = [losses[count:] for losses in self._waiting]
        return complete
