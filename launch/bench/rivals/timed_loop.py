"""A training loop under the clock, for everybody who is compared with us: warm-up, looks at the held-out data, goal.

step 0 .. w-1   step w .. n-1                       w = warm-up, n = steps
|               |--- throughput ---|                looks at the held-out data lie on the clock
|------------ until the goal is met -------|        no batch is trained after it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.data.loader import evaluation_steps
from pipeline.plan.goal import Reached
from pipeline.plan.plan import Plan
from pipeline.stage.evaluation import EvaluationMetrics

__all__ = ["TimedLoop"]


@dataclass
class TimedLoop:
    """Iterate over it to get the numbers of the batches; train on each in the body.

    Attributes:
        warmup: first batches that are not timed.
        look: scores of one pass over the held-out batches, with the weights of that moment; None: no goal is given.
        together: called before the clock starts, e.g. a barrier.
        batches: training batches that count; all where the goal was met within the warm-up.
        seconds: how long they took, up to the end of the last one.
        reached: when the goal was met; None: never, or not asked for.
    """

    plan: Plan
    warmup: int
    look: Callable[[], EvaluationMetrics] | None = None
    together: Callable[[], None] = lambda: None
    batches: int = 0
    seconds: float = 0.0
    reached: Reached | None = None

    def __iter__(self) -> Iterator[int]:
        steps, goal = self.plan.steps or 0, self.plan.goal
        looks = evaluation_steps(self.plan, steps)
        start = begin = 0.0
        for step in range(steps):
            if step in (0, self.warmup):
                self.together()
                begin = time.perf_counter()
                start = start or begin
            yield step
            trained, now = step + 1, time.perf_counter()
            self.batches = trained - self.warmup if trained > self.warmup else trained
            self.seconds = now - begin
            if goal is None or trained not in looks:
                continue
            assert self.look is not None, "who has a goal looks whether it is met"
            scores = self.look()
            loss, accuracy = scores.loss(), scores.accuracy()
            if goal.met(loss, accuracy):
                self.reached = Reached(trained, time.perf_counter() - start, loss, accuracy)
                return
