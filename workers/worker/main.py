"""One stage in one process: attach to the others, run the loop, write what came out.

    spawn -> build the stage -> attach channels -> Ready -> Go -> loop -> files -> Finished
                                                                 any error -> Failure

The loop only moves messages; what to do next is the policy's business.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.data.network import stage_layers
from pipeline.data.recipe import Recipe
from pipeline.errors import PlanError
from pipeline.messages.bundle import Specs, TensorSpec
from pipeline.metrics.spans import Recorder, Span
from pipeline.plan.device_choice import on_gpu
from pipeline.plan.replica_layout import plan_of, policy_of
from pipeline.replicas.all_gather import gathering
from pipeline.replicas.averaging import averager_of
from pipeline.run.fingerprint import fingerprint
from pipeline.run.hollow_stage import HollowStage
from pipeline.run.reference import schedule
from pipeline.run.runner import Runner
from pipeline.run.sketch import Sketch
from pipeline.schedule.policies import Action, scripted
from pipeline.stage.dni_quality import Quality
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.stage import Stage
from pipeline.stage.unlock import Switch
from workers.channels.errors import ChannelBroken
from workers.clock import now_ns
from workers.files import replacing, writing
from workers.processes.claim_gpu import finish, peak_memory_bytes, prepare_device
from workers.telemetry import records
from workers.telemetry.gpu_span_recorder import CudaMarks, GpuSpanRecorder
from workers.telemetry.span_recorder import Pulse, SpanRecorder
from workers.telemetry.status_table import StatusTable
from workers.worker.assignment import Assignment
from workers.worker.emulated import Sleeper
from workers.worker.failure_report import failure_of
from workers.worker.orphan import ends_with_the_driver
from workers.worker.ports import Ports, attached

__all__ = ["worker_main"]

LOOK_UP_EVERY_S = 1.0  # a waiting worker looks whether it is asked to stop
CAUSE_WITHIN_NS = 1_000_000_000
LOOK_FOR_CAUSE_EVERY_S = 0.01
LOSSES_EVERY_NS = 200_000_000


class StopAsked(Exception):
    """The driver asked the worker to end."""


def worker_main(assignment: Assignment, connection: Connection, listener: Path | None = None) -> None:
    """The life of a worker process, until the run is over; exits non-zero after a failure.

    ``connection`` is the control pipe to the driver, ``listener`` the socket of the fork server that it comes from.
    """
    os.setsid()  # a group of its own: Ctrl-C reaches the driver only, and the driver can end us with our children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked in the fork server
    torch.set_num_threads(assignment.plan.threads)
    # A failure is reported before the channels close: it is seen first.
    with ends_with_the_driver(assignment, listener), contextlib.ExitStack() as stack:
        try:
            with writing(assignment.files["stacks"]):
                stacks = assignment.files["stacks"].open("w")
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
            _work(assignment, connection, stack)
        except StopAsked:
            raise SystemExit(1) from None
        except BaseException as error:
            with contextlib.suppress(OSError):
                records.send(connection, failure_of(assignment, error))
            raise SystemExit(1) from None


def _work(assignment: Assignment, connection: Connection, stack: contextlib.ExitStack) -> None:
    plan, device = assignment.plan, assignment.device
    prepare_device(device, plan)
    recipe = assignment.resolved.arranged(assignment.source())
    board = stack.enter_context(StatusTable(assignment.names.board, plan.workers))
    spans: SpanRecorder | None = None
    if plan.spans:
        where = assignment.worker, board, assignment.files["spans"]
        spans = GpuSpanRecorder(*where, CudaMarks(device)) if on_gpu(device) else SpanRecorder(*where)
    record = spans or Pulse(assignment.worker, board)
    ports = stack.enter_context(attached(assignment, recipe, record, lambda step: runner.averager.enough(step)))
    if spans is not None:
        spans.depth = ports.depth
    stage, built = _build(assignment, recipe, record)
    runner = _runner(assignment, stage, ports, record, board)
    report = _Reporter(connection, assignment.resolved.warmup, assignment.replica)
    runner.on_loss, runner.on_scores = report.loss, report.scores
    runner.on_quality, runner.on_switch = partial(report.quality, assignment.index), report.switch
    threads = torch.get_num_threads()
    records.send(connection, records.Ready(assignment.index, os.getpid(), threads, assignment.replica, built))
    if not connection.poll(assignment.attach_within_s):
        raise TimeoutError(f"no Go from the driver after {assignment.attach_within_s:.0f} s")
    records.receive(connection)
    begin_ns = now_ns()
    try:
        _loop(runner, ports, board, record, plan.stall_after_s)
        finish(device)
    except ChannelBroken:
        _leave_word_to_the_cause(board)
        raise
    finally:
        end_ns = now_ns()
        if spans is not None:
            spans.close()
    report.flush()
    if assignment.replica == 0:
        _save(assignment, stage)
    counts = runner.updated, runner.learned, runner.dropped
    sent, times = (ports.sent_bytes("activations"), ports.sent_bytes("gradients")), (begin_ns, end_ns)
    told = (*counts, peak_memory_bytes(device), *times, report.window_ns, *sent, assignment.replica)
    records.send(connection, records.Finished(assignment.index, *told))


def _loop(runner: Runner, ports: Ports, board: StatusTable, record: Recorder, give_up_after_s: float) -> None:
    """Until nothing is left to do: look, decide, do; when there is nothing to do, sleep on the bell."""
    record(Span.OTHER, -1)
    while True:
        ports.bell.clear()
        runner.poll()
        if runner.done:
            return
        if board.stopping:
            raise StopAsked
        action = runner.next()
        if action is not Action.WAIT:
            runner.perform(action)
        else:
            _wait(runner, ports, board, record, give_up_after_s)


def _wait(runner: Runner, ports: Ports, board: StatusTable, record: Recorder, give_up_after_s: float) -> None:
    """Until somebody rings, or a message that an emulated link holds back is due."""
    record(Span.HELD if runner.averager.held else Span.WAIT, runner.forwarded)
    # The driver ends a stalled run first, with a better report; this is for when the driver cannot.
    deadline_ns, progress = 0, -1
    while not ports.wait(LOOK_UP_EVERY_S):
        if board.stopping:
            raise StopAsked
        if (seen := board.progress()) != progress:  # replicas may wait for each other for as long as somebody works
            deadline_ns, progress = now_ns() + int(2 * give_up_after_s * 1e9), seen
        if now_ns() > deadline_ns:
            raise TimeoutError(f"nothing came for {2 * give_up_after_s:.0f} s: {runner.view()}")
    record(Span.OTHER, -1)


def _leave_word_to_the_cause(board: StatusTable) -> None:
    """Another worker died. The driver sees that itself, and knows more; this one speaks up if the driver does not."""
    deadline_ns = now_ns() + CAUSE_WITHIN_NS
    while now_ns() < deadline_ns:
        if board.stopping:
            raise StopAsked
        time.sleep(LOOK_FOR_CAUSE_EVERY_S)


def _build(assignment: Assignment, recipe: Recipe, record: Recorder) -> tuple[Stage | HollowStage, dict[str, Sketch]]:
    """The stage, and what it begins with, for the driver to compare."""
    plan, resolved, index = assignment.plan, assignment.resolved, assignment.index
    if plan.emulation is not None:
        last: Specs = (TensorSpec("output", resolved.output_shape, torch.float32, differentiable=True),)
        output = last if assignment.last else resolved.cuts[index].specs
        return HollowStage(index, plan, output, record, Sleeper().lasting), {}
    cut = None if assignment.last else resolved.cuts[index].with_loss(recipe.loss)
    below = None if index == 0 else resolved.cuts[index - 1]
    layers, start = stage_layers(recipe, plan, index), sum(resolved.sizes[:index])
    names, expected = tuple(layer.name for layer in layers), resolved.layer_names[start : start + resolved.sizes[index]]
    if names != expected:  # a stage of other layers cannot even be built; the driver finds all other differences
        raise PlanError(
            f"model() gives this stage the layers {', '.join(names) or 'none'} in the worker, {', '.join(expected)} in "
            "the program that started it: it must build the same network whenever it is called."
        )
    built, mine = fingerprint(recipe, resolved, index, layers, assignment.replica), plan_of(plan, assignment.replica)
    return Stage(layers, index, mine, recipe, cut, below, record, assignment.device), built


def _runner(
    assignment: Assignment, stage: Stage | HollowStage, ports: Ports, record: Recorder, board: StatusTable
) -> Runner:
    plan, queues = assignment.plan, (ports.inlets, ports.outlets)
    policy = policy_of(plan)
    if plan.deterministic:
        policy = scripted(schedule(plan, assignment.resolved.held_out_batches)[assignment.worker])
    exchange = gathering(plan, assignment.index, assignment.replica, *queues)
    averager = averager_of(plan, stage.state_tensors(), exchange, lambda: board.enough, record)
    return Runner(
        stage, policy, *queues, averager=averager, record=record, stages=plan.stages, microbatches=plan.microbatches
    )


class _Reporter:
    """Sends training losses in groups, so that the pipe is not in the way, and scores at once; times the run."""

    def __init__(self, connection: Connection, warmup: int, replica: int) -> None:
        self._connection, self._warmup, self._replica = connection, warmup, replica
        self._begin_ns = 0
        self.window_ns: tuple[int, int] | None = None
        self._losses: list[float] = []
        self._first, self._sent_ns = 0, now_ns()

    def loss(self, batch: int, loss: float) -> None:
        if not self._losses:
            self._first = batch
        self._losses.append(loss)
        if batch == self._warmup - 1:
            self._begin_ns = now_ns()
        elif batch >= self._warmup:
            self.window_ns = self._begin_ns, now_ns()
        if now_ns() - self._sent_ns > LOSSES_EVERY_NS:
            self.flush()

    def scores(self, updates: int, scores: EvaluationMetrics) -> None:
        self.flush()
        found = scores.loss(), scores.accuracy(), scores.rows
        records.send(self._connection, records.Scored(updates, *found, now_ns()))

    def quality(self, stage: int, quality: Quality) -> None:
        judged = records.Judged(stage, **asdict(quality), time_ns=now_ns(), replica=self._replica)
        records.send(self._connection, judged)

    def switch(self, switch: Switch) -> None:
        records.send(self._connection, records.Switched(**asdict(switch), time_ns=now_ns(), replica=self._replica))

    def flush(self) -> None:
        if self._losses:
            records.send(self._connection, records.Loss(self._first, self._losses, now_ns(), self._replica))
            self._losses, self._sent_ns = [], now_ns()


def _save(assignment: Assignment, stage: Stage | HollowStage) -> None:
    for what, tensors in (("model", stage.state_tensors()), ("optimizer", stage.optimizer_tensors())):
        path = assignment.files[what]
        content = save(_apart(tensors))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            draft.write_bytes(content)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense CPU tensors that share no memory, as safetensors wants them: copies of those that do."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage()
        alone = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = tensor.detach() if alone else tensor.detach().clone(memory_format=torch.contiguous_format)
    return apart
