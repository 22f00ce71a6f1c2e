"""One stage and its policy, with the queues around them. Drivers only move messages and time.

             below (activations) ->  +--------+  -> down (activations)
                                     | Runner |
             up (gradients)      <-  +--------+  <- above (gradients)
                                         |
                            averager: the same stage of other replicas

The reference driver and the worker loop of a process drive the same Runner: ``poll`` looks into the queues, ``next``
asks the policy, ``perform`` does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from pipeline.errors import StageError
from pipeline.messages.message import Kind, Message
from pipeline.messages.queue_ends import Inlet, Outlet
from pipeline.metrics.spans import Recorder, Span, silent
from pipeline.replicas.averaging import ALONE, Averager
from pipeline.schedule.policies import Action, Policy, View
from pipeline.stage.dni_quality import Quality
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.unlock import Switch

__all__ = ["Runner", "StageLike"]


class StageLike(Protocol):
    """What a Runner needs of a stage; ``Stage`` computes, a phantom only counts."""

    index: int
    last: bool
    scores: EvaluationMetrics

    def updates(self, batch: int) -> bool: ...
    def locked(self, batch: int) -> bool: ...
    def awaited(self, batch: int, microbatch: int = 0) -> bool: ...
    def keeps(self, batch: int, microbatch: int = 0) -> bool: ...
    def relaying(self) -> list[int]: ...
    def forget(self, before: int) -> None: ...
    def switched(self) -> Switch | None: ...
    def forward(
        self, batch: int, x: Tensor, labels: Tensor, microbatch: int = 0, *, awaited: bool = False
    ) -> Tensor: ...
    def predict(self, batch: int) -> Tensor | None: ...
    def backward(self, batch: int, gradient: Tensor | None, microbatch: int = 0) -> Tensor | None: ...
    def step(self, batch: int) -> None: ...
    def skip(self, batch: int) -> None: ...
    def learn(self, batch: int, gradient: Tensor) -> Tensor | None: ...
    def true_gradient(self) -> Tensor | None: ...
    def judge(self, batch: int, gradient: Tensor) -> tuple[Quality | None, Tensor | None]: ...
    def evaluate(self, batch: int, x: Tensor, labels: Tensor) -> Tensor: ...
    def loss_of(self, batch: int) -> float: ...
    def state_tensors(self) -> dict[str, Tensor]: ...


@dataclass
class Runner:
    """Drives one stage by one policy.

    Attributes:
        stage: does the work.
        policy: says what is next.
        below: activations from the stage below, or the loader.
        above: gradients from the stage above; None for the last stage.
        down: activations to the stage above; None for the last stage.
        up: gradients to the stage below; None for the first stage.
        ahead: how many batches async-1f1b may have open besides one; None: as many as there are stages above.
        averager: what the stage averages with its replicas.
        record: told what the worker turns to.
        on_loss: last stage: called with (batch, training loss).
        on_scores: last stage: called with (number of updates, scores of a pass over the held-out batches).
        on_quality: below the last stage: called with the quality of every sampled batch.
        on_switch: below the last stage: called whenever the stage locks or unlocks.
        stages: number of stages of the pipeline.
        microbatches: microbatches per batch.
        forwarded, backwarded: counts of training microbatches.
        updated, learned: counts of training batches; one that is left without an update counts as updated.
        dropped: targets, for which nobody waits, that were dropped because the gradient channel was full.
        done: nothing is left to do.
    """

    stage: StageLike
    policy: Policy
    below: Inlet
    above: Inlet | None = None
    down: Outlet | None = None
    up: Outlet | None = None
    ahead: int | None = None
    averager: Averager = ALONE
    record: Recorder = silent
    on_loss: Callable[[int, float], None] = field(default=lambda batch, loss: None)
    on_scores: Callable[[int, EvaluationMetrics], None] = field(default=lambda updates, scores: None)
    on_quality: Callable[[Quality], None] = field(default=lambda quality: None)
    on_switch: Callable[[Switch], None] = field(default=lambda switch: None)
    stages: int = 1
    microbatches: int = 1
    forwarded: int = 0
    backwarded: int = 0
    updated: int = 0
    learned: int = 0
    dropped: int = 0
    actions: int = 0
    done: bool = False
    _activation: Message | None = None
    _gradient: Message | None = None
    _unsent: list[Message] = field(default_factory=list)
    _target: Message | None = None
    _ended_above: bool = False
    _ended_below: bool = False
    _trained_below: bool = False

    def poll(self) -> None:
        """Look into the queues: at most one message of each is held.

        Raises:
            StageError: what came from above has no place: it came twice, or something before it is missing.
        """
        self._flush()
        self.averager.poll()
        while self.above is not None and self._gradient is None and not self._ended_above:
            if (came := self.above.take()) is None:
                break
            self._take_in(came)
        if self._activation is None and not self._ended_below:
            self._activation = self.below.take()

    def next(self) -> Action:
        """What to do now. Pure: does not look into the queues again."""
        return self.policy(self.view())

    def view(self) -> View:
        """What the policy may know."""
        return View(
            stages_above=self.stages - 1 - self.stage.index,
            microbatches=self.microbatches,
            forwarded=self.forwarded,
            backwarded=self.backwarded,
            activation=self._activation is not None,
            gradient=self._gradient is not None,
            room=self.down is None or self.down.room(),
            ended=self._ended_below or self._trained_below,
            actions=self.actions,
            average=self.averager.ready,
            held=self.averager.held,
            updates=self.stage.updates(self.updated),
            locked=self.stage.locked(self.updated),
            late=self._gradient is not None and self._is_late(self._gradient),
            ahead=self.ahead,
        )

    def perform(self, action: Action) -> None:
        """Do it.

        Raises:
            StageError: the work failed, or a message is not the one whose turn it is.
        """
        self.actions += 1
        if action is Action.FORWARD:
            self._forward()
        elif action is Action.UPDATE:
            self._update(self.stage.predict(self.updated))
        elif action is Action.BACKWARD:
            self._backward()
        elif action is Action.SKIP:
            self._skip()
        elif action is Action.LEARN:
            self._learn()
        elif action is Action.AVERAGE:
            self._average()
        self.record(Span.OTHER, -1)

    # ------------------------------------------------------------------ private

    def _forward(self) -> None:
        message, self._activation = self._activation, None
        assert message is not None, "the policy took an activation that is not there"
        kind, batch = message.kind, message.batch
        if kind in (Kind.ACTIVATION, Kind.AWAITED):
            part = self._in_turn("activation", self.forwarded, message)
            x, labels = message.tensors
            h = self.stage.forward(batch, x, labels, microbatch=part, awaited=kind is Kind.AWAITED)
            waits = self.stage.locked(batch)
            sent_as = Kind.AWAITED if waits else Kind.ACTIVATION
            self._send_down(Message(sent_as, batch, self.stage.index, (h, labels), microbatch=part))
            self.forwarded += 1
            if waits:
                self.stage.predict(batch)  # used for nothing: what the DNI learns without a gradient it learns here
            if (switch := self.stage.switched()) is not None:
                self.on_switch(switch)
        elif kind is Kind.EVALUATION:
            h = self.stage.evaluate(batch, *message.tensors)
            self._send_down(Message(kind, batch, self.stage.index, (h, message.tensors[1])))
        elif kind is Kind.REPORT:
            self._send_down(Message(kind, batch, self.stage.index))
            if self.stage.last:
                self.on_scores(batch, self.stage.scores)
                self.stage.scores = EvaluationMetrics()
        elif kind is Kind.TRAINED:
            self._trained_below = True
            self._send_down(Message(kind, batch, self.stage.index))
            self._after_training()
        elif kind is Kind.END:
            self._ended_below = True
            self._send_down(Message(kind, batch, self.stage.index))
            if self.stage.last:
                self._end(message)

    def _backward(self) -> None:
        gradient = None if self.stage.last else self._taken_gradient(self.backwarded).tensors[0]
        batch = self.updated
        self._update(gradient)
        if gradient is not None and self.stage.locked(batch):
            self.stage.learn(batch, gradient)
            self.learned += 1

    def _is_late(self, message: Message) -> bool:
        return message.kind is Kind.SAMPLE or message.batch < self.updated

    def _update(self, gradient: Tensor | None) -> None:
        """Backpropagate the next microbatch, send up what is to be sent; step after the last one of its batch."""
        batch, part = divmod(self.backwarded, self.microbatches)
        awaited = self.stage.awaited(batch, part)
        below = self.stage.backward(batch, gradient, microbatch=part)
        self.backwarded += 1
        if below is not None:
            message = Message(Kind.GRADIENT, batch, self.stage.index, (below,), microbatch=part)
            self._send_up(message, awaited=awaited)
        self._send_sample(batch, self.stage.true_gradient())
        if part < self.microbatches - 1:
            return
        if not self.averager.before_step():
            self._step(batch)

    def _step(self, batch: int) -> None:
        self.stage.step(batch)
        self.updated += 1
        if self.stage.last:
            self.on_loss(batch, self.stage.loss_of(batch))
        self.averager.after_step()
        self._after_training()

    def _average(self) -> None:
        if self.averager.take():
            self._step(self.updated)

    def _after_training(self) -> None:
        """Once no training batch will come and none is open."""
        if self._trained_below and self.forwarded == self.backwarded:
            self.averager.after_training()

    def _skip(self) -> None:
        batch = self.updated
        self.stage.skip(batch)
        self.backwarded += 1
        self.updated += 1
        if self.stage.last:
            self.on_loss(batch, self.stage.loss_of(batch))
        self._after_training()

    def _learn(self) -> None:
        message = self._taken_gradient(None)
        if message.kind is Kind.SAMPLE:
            quality, below = self.stage.judge(message.batch, message.tensors[0])
            if quality is not None:
                self.on_quality(quality)
            self._send_sample(message.batch, below)
            return
        relayed = self.stage.learn(message.batch, message.tensors[0])
        self.learned += 1
        if relayed is not None:
            self._send_up(Message(Kind.GRADIENT, message.batch, self.stage.index, (relayed,)), awaited=False)

    def _taken_gradient(self, expected: int | None) -> Message:
        message, self._gradient = self._gradient, None
        assert message is not None, "the policy took a gradient that is not there"
        if expected is not None:
            self._in_turn("gradient", expected, message)
        return message

    def _in_turn(self, what: str, expected: int, message: Message) -> int:
        """The microbatch of a message, which must be number ``expected`` of all."""
        batch, part = divmod(expected, self.microbatches)
        if (message.batch, message.microbatch) != (batch, part):
            raise StageError(
                f"expected the {what} of batch {batch}.{part}, got that of batch {message.batch}.{message.microbatch} "
                f"from stage {message.stage}",
                stage=self.stage.index,
                batch=batch,
            )
        return part

    def _take_in(self, message: Message) -> None:
        """Something came from above: hold a gradient until its turn, take word at once."""
        batch, index = message.batch, self.stage.index
        if message.kind is Kind.END:
            if self.forwarded != self.backwarded:
                what = f"the END came from stage {message.stage} before the gradient of this batch"
                raise StageError(what, stage=index, batch=self.updated)
            self._ended_above = True
            self._end(message)
        elif message.kind is Kind.DROPPED:
            relaying = self.stage.relaying()
            self.stage.forget(min(batch, self.updated))
            if self.stage.relaying() != relaying:
                self._send_word()
        elif message.kind is Kind.GRADIENT and not self.stage.keeps(batch, message.microbatch):
            what = f"a gradient came from stage {message.stage} that this stage does not wait for, or no longer"
            raise StageError(f"{what} (microbatch {message.microbatch})", stage=index, batch=batch)
        else:
            self._gradient = message

    def _end(self, message: Message) -> None:
        """The END came back from above (or reached the last stage): echo it up; this stage is done."""
        if self.up is not None:
            self._unsent.append(Message(Kind.END, message.batch, self.stage.index))
            self._flush()
        self.done = not self._unsent

    def _send_down(self, message: Message) -> None:
        if self.down is not None:
            self.record(Span.SEND, message.batch)
            self.down.put(message)

    def _send_up(self, message: Message, *, awaited: bool) -> None:
        """Never blocks: what finds no room waits; as many gradients as are awaited, but one target, the newest."""
        if self.up is None:
            return
        self.record(Span.SEND, message.batch)
        drops = not awaited and self._target is not None
        if drops:
            self._unsent = [waiting for waiting in self._unsent if waiting is not self._target]
            self.dropped += 1
        self._target = self._target if awaited else message
        self._unsent.append(message)
        self._flush()
        if drops:
            self._send_word()

    def _send_word(self) -> None:
        """Tell the stage below that targets were dropped, so that it keeps nothing for them; later word says it all."""
        if self.up is not None:
            oldest = min([self.updated, *self.stage.relaying()])  # of what may still be sent behind this word
            self._unsent = [waiting for waiting in self._unsent if waiting.kind is not Kind.DROPPED]
            self._unsent.append(Message(Kind.DROPPED, oldest, self.stage.index))
            self._flush()

    def _send_sample(self, batch: int, gradient: Tensor | None) -> None:
        """Never blocks either; samples are few, and none is dropped."""
        if gradient is not None and self.up is not None:
            self.record(Span.SEND, batch)
            self._unsent.append(Message(Kind.SAMPLE, batch, self.stage.index, (gradient,)))
            self._flush()

    def _flush(self) -> None:
        while self._unsent and self.up is not None and self.up.room():
            message = self._unsent.pop(0)
            self._target = None if message is self._target else self._target
            self.up.put(message)
            self.done = message.kind is Kind.END
