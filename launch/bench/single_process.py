"""The yardstick: one process, a plain PyTorch loop, none of our machinery in the way."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec
import torch

from launch.bench.rivals.timed_loop import TimedLoop
from pipeline.data.recipe import Recipe, build_model, open_data
from pipeline.model.compute import ComputeContext
from pipeline.model.optimizers import build_optimizer
from pipeline.model.partition import layers_of
from pipeline.plan.device_choice import CPU
from pipeline.plan.goal import Reached
from pipeline.plan.plan import Plan
from pipeline.stage.evaluation import scores_of
from workers.errors import RunFailed
from workers.processes.claim_gpu import peak_memory_bytes, prepare_device
from workers.processes.context import process_context
from workers.processes.end_with_parent import end_with_the_parent

__all__ = ["SingleRun", "run_single"]

_LOOK_EVERY_S = 0.5


class SingleRun(msgspec.Struct, frozen=True):
    """What the single process measured.

    Attributes:
        batches: training batches after the warm-up.
        seconds: how long they took, looks at the held-out data between them included.
        forward_s: of it, in forward passes.
        backward_s: of it, in the loss, the backward passes and the optimizer, as in the last stage of a pipeline.
        loss: held-out loss, or the last training loss without held-out data.
        accuracy: held-out accuracy, if the recipe counts right answers.
        peak_memory_bytes: peak resident memory, or of the GPU.
        reached: when ``plan.until`` was met, which ended the run; None: never, or not asked for.
    """

    batches: int
    seconds: float
    forward_s: float
    backward_s: float
    loss: float
    accuracy: float | None
    peak_memory_bytes: int
    reached: Reached | None = None


@dataclass(frozen=True)
class _Job:
    source: Callable[[], Recipe]
    plan: Plan
    threads: int
    warmup: int
    device: str


def run_single(
    source: Callable[[], Recipe],
    plan: Plan,
    *,
    threads: int,
    warmup: int,
    within_s: float = 3600.0,
    look: Callable[[], None] = lambda: None,
    device: str = CPU,
) -> SingleRun:
    """Train the unsplit model in a fresh process with ``threads`` compute threads.

    Args:
        source: makes the recipe.
        plan: steps, seed and optimizer, and what ends the run before its last step.
        threads: compute threads.
        warmup: first batches that are not timed.
        within_s: how long it may take.
        look: called twice a second meanwhile; what it raises ends the run.
        device: where it computes. On a GPU the forward pass is timed until it is queued; the loss is read at every
            step, which waits for the rest, and so does the clock.

    Raises:
        RunFailed: the process failed or took too long.

    Blocks:
        until it is over, at most ``within_s``.
    """
    context = process_context(__name__)
    mine, theirs = context.Pipe()
    process = context.Process(target=_main, args=(_Job(source, plan, threads, warmup, device), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        end = time.monotonic() + within_s
        while not mine.poll(min(_LOOK_EVERY_S, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                raise RunFailed(f"the single-process run did not end within {within_s:.0f} s", stage=0)
            look()
        return msgspec.msgpack.decode(mine.recv_bytes(), type=SingleRun)
    except EOFError:
        process.join(2.0)
        raise RunFailed(f"the single-process run ended with exit code {process.exitcode}", stage=0) from None
    finally:
        process.kill()
        process.join(5.0)
        mine.close()


def _main(job: _Job, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    end_with_the_parent()
    torch.set_num_threads(job.threads)
    prepare_device(job.device, job.plan)
    recipe, computing = job.source(), ComputeContext(job.plan, job.device)
    layers = [layer.module for layer in layers_of(build_model(recipe, job.plan.seed))]
    modules = computing.placed(torch.nn.Sequential(*layers))
    network = computing.network(modules)
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizer = build_optimizer(job.plan.optimizer, parameters, job.plan.steps)
    assert optimizer is not None, "the recipe's model has parameters"
    loop = TimedLoop(job.plan, job.warmup, look=lambda: scores_of(recipe, modules, computing))
    forward_s = backward_s = 0.0
    value = float("nan")
    open_data(recipe, job.plan)
    for step in loop:
        if step == job.warmup:
            forward_s = backward_s = 0.0
        inputs, labels = computing.here(*recipe.seeded_batch(job.plan.seed, step))
        loaded = time.perf_counter()
        with computing.autocast():
            output = network(inputs)
        forwarded = time.perf_counter()
        with computing.autocast():
            loss = recipe.loss(output, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())  # a GPU is waited for here
        forward_s, backward_s = forward_s + forwarded - loaded, backward_s + time.perf_counter() - forwarded
    scores = scores_of(recipe, modules, computing)
    peak_bytes = peak_memory_bytes(job.device)
    held_out = scores.loss() if scores.rows else value
    run = SingleRun(
        loop.batches, loop.seconds, forward_s, backward_s, held_out, scores.accuracy(), peak_bytes, loop.reached
    )
    connection.send_bytes(msgspec.msgpack.encode(run))
