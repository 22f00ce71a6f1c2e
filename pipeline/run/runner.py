"""One stage and its policy, with the queues around them. Drivers only move messages and time.

        activations from below, or data  ->  +--------+  -> activations to the stage above
                                             | Runner |
              gradients to below (Uplink)  <-  +--------+  <- gradients from above
                                                 |
                            averager: the same stage of other replicas

The reference driver and the worker loop of a process drive the same Runner: ``poll`` looks into the queues, ``next``
asks the policy, ``perform`` does it. Which queues there are is a matter of the topology: they come by edge.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pipeline.errors import StageError
from pipeline.messages.bundle import Bundle, Item
from pipeline.messages.message import Kind, Message
from pipeline.messages.queue_ends import Inlet, Outlet
from pipeline.metrics.spans import Recorder, Span, silent
from pipeline.plan.topology import Edge, What
from pipeline.replicas.averaging import ALONE, Averager
from pipeline.run.hollow_stage import HollowStage
from pipeline.run.uplink import Uplink
from pipeline.schedule.policies import Action, Policy, View
from pipeline.stage.dni_quality import Quality
from pipeline.stage.evaluation import EvaluationMetrics
from pipeline.stage.gradient_flow import Route
from pipeline.stage.stage import Stage
from pipeline.stage.unlock import Switch

__all__ = ["Runner"]

_End = TypeVar("_End")


@dataclass
class Runner:
    """Drives one stage by one policy.

    The last stage calls ``on_loss`` with (batch, training loss) and ``on_scores`` with (number of updates, metrics of a
    pass over the held-out batches), those below it the other two.
    """

    stage: Stage | HollowStage
    policy: Policy
    inlets: Mapping[Edge, Inlet]
    outlets: Mapping[Edge, Outlet]
    stages: int = 1
    microbatches: int = 1
    ahead: int | None = None  # how many batches async-1f1b may have open besides one; None: as many as stages above
    averager: Averager = ALONE
    record: Recorder = silent
    on_loss: Callable[[int, float], None] = lambda batch, loss: None
    on_scores: Callable[[int, EvaluationMetrics], None] = lambda updates, scores: None
    on_quality: Callable[[Quality], None] = lambda quality: None  # of every sampled batch
    on_switch: Callable[[Switch], None] = lambda switch: None  # the stage locks or unlocks
    forwarded: int = 0  # training microbatches, as ``backwarded``
    backwarded: int = 0
    updated: int = 0  # training batches, as ``learned``; one that is left without an update counts
    learned: int = 0
    actions: int = 0
    _activation: Message | None = None
    _gradient: Message | None = None
    _open: deque[Route] = field(default_factory=deque)  # of the batches between their forward and their update
    _ended_above: bool = False
    _ended_below: bool = False
    _trained_below: bool = False

    def __post_init__(self) -> None:
        below, self._above = _only(self.inlets, "activations"), _only(self.inlets, "gradients")
        assert below is not None, "every stage has something that comes in"
        self._below, self._down = below, _only(self.outlets, "activations")
        self._up = Uplink(self.stage.index, _only(self.outlets, "gradients"), self.record)

    @property
    def done(self) -> bool:
        """Nothing is left to do."""
        return self._up.ended

    @property
    def dropped(self) -> int:
        """Targets, for which nobody waits, that were dropped because the gradient channel was full."""
        return self._up.dropped

    def poll(self) -> None:
        """Look into the queues: at most one message of each is held. StageError: one from above has no place."""
        self._up.flush()
        self.averager.poll()
        while self._above is not None and self._gradient is None and not self._ended_above:
            if (message := self._above.take()) is None:
                break
            self._take_in(message)
        if self._activation is None and not self._ended_below:
            self._activation = self._below.take()

    def next(self) -> Action:
        """What to do now, from what lay in the queues."""
        return self.policy(self.view())

    def view(self) -> View:
        """What the policy may know."""
        oldest, came = self._open[0] if self._open else None, self._gradient
        late = came is not None and (came.kind is Kind.SAMPLE or came.batch < self.updated)
        return View(
            stages_above=self.stages - 1 - self.stage.index,
            microbatches=self.microbatches,
            forwarded=self.forwarded,
            backwarded=self.backwarded,
            activation=self._activation is not None,
            gradient=came is not None,
            room=self._down is None or self._down.room(),
            ended=self._ended_below or self._trained_below,
            actions=self.actions,
            average=self.averager.ready,
            held=self.averager.held,
            updates=oldest is None or oldest.updates,
            locked=oldest is not None and oldest.locked,
            late=late,
            ahead=self.ahead,
        )

    def perform(self, action: Action) -> None:
        """Do it. StageError: the work failed, or a message is not the one whose turn it is."""
        self.actions += 1
        if action is Action.FORWARD:
            self._forward()
        elif action is Action.UPDATE:
            self._update(self.stage.predict(Item(self.updated)))
        elif action is Action.BACKWARD:
            self._backward()
        elif action is Action.SKIP:
            self.stage.skip(Item(self.updated))
            self.backwarded += 1
            self._end_batch()
            self._after_training()
        elif action is Action.LEARN:
            self._learn()
        elif action is Action.AVERAGE and self.averager.take():
            self._step()
        self.record(Span.OTHER, -1)

    def _forward(self) -> None:
        message, self._activation = self._activation, None
        assert message is not None, "the policy took an activation that is not there"
        if (kind := message.kind) in (Kind.ACTIVATION, Kind.AWAITED):
            self._forward_batch(message)
            return
        h = self.stage.evaluate(message.batch, message.payload, message.context) if kind is Kind.EVALUATION else ()
        self._send_down(kind, message.item, h, message.context)
        if kind is Kind.TRAINED:
            self._trained_below = True
            self._after_training()
        elif kind is Kind.END:
            self._ended_below = True
            if self.stage.last:  # echoes it up
                self._up.send(Message(kind, message.item, self.stage.index))
        elif kind is Kind.REPORT and self.stage.last:
            self.on_scores(message.batch, self.stage.scores)
            self.stage.scores = EvaluationMetrics()

    def _forward_batch(self, message: Message) -> None:
        item = self._in_turn("activation", self._item(self.forwarded), message).item
        h = self.stage.forward(item, message.payload, message.context, awaited=message.kind is Kind.AWAITED)
        route = self.stage.in_flight.of(item).route
        self._send_down(Kind.AWAITED if route.locked else Kind.ACTIVATION, item, h, message.context)
        self.forwarded += 1
        if item.microbatch == 0:
            self._open.append(route)
        if route.locked:
            self.stage.predict(item)  # not used: the DNI learns here what it learns without a gradient
        if (switch := self.stage.switched()) is not None:
            self.on_switch(switch)

    def _backward(self) -> None:
        item = self._item(self.backwarded)
        gradient = None if self.stage.last else self._in_turn("gradient", item, self._taken_gradient()).payload
        learns = self._open[0].locked and self._open[0].wants_target
        self._update(gradient)
        if gradient is not None and learns:
            self.stage.learn(item, gradient)
            self.learned += 1

    def _update(self, gradient: Bundle | None) -> None:
        """Backpropagate the next microbatch, send up what is to be sent; step after the last one of its batch."""
        item, awaited = self._item(self.backwarded), self._open[0].awaited
        below = self.stage.backward(item, gradient)
        self.backwarded += 1
        self._send_gradient(item, below, awaited=awaited)
        self._send_sample(item.batch, self.stage.true_gradient())
        if item.microbatch == self.microbatches - 1 and not self.averager.before_step():
            self._step()

    def _step(self) -> None:
        self.stage.step(self.updated)
        self._end_batch()
        self.averager.after_step()
        self._after_training()

    def _end_batch(self) -> None:
        batch = self.updated
        self.updated += 1
        self._open.popleft()
        if self.stage.last:
            self.on_loss(batch, self.stage.loss_of(batch))

    def _after_training(self) -> None:
        """Once no training batch will come and none is open."""
        if self._trained_below and self.forwarded == self.backwarded:
            self.averager.after_training()

    def _take_in(self, message: Message) -> None:
        """Something came from above: a gradient is held until its turn, the rest takes effect at once."""
        item, index = message.item, self.stage.index
        if message.kind is Kind.END:
            if self.forwarded != self.backwarded:
                what = f"the END came from stage {message.stage} before the gradient of this batch"
                raise StageError(what, stage=index, batch=self.updated)
            self._ended_above = True
            self._up.send(Message(Kind.END, item, index))
        elif message.kind is Kind.DROPPED:
            relaying = self.stage.in_flight.relaying()
            self.stage.in_flight.forget(min(item.batch, self.updated))
            if self.stage.in_flight.relaying() != relaying:
                self._tell_dropped()
        elif message.kind is Kind.GRADIENT and item not in self.stage.in_flight:
            what = f"a gradient came from stage {message.stage} that this stage does not wait for, or no longer"
            raise StageError(f"{what} (microbatch {item.microbatch})", stage=index, batch=item.batch)
        else:
            self._gradient = message

    def _learn(self) -> None:
        message = self._taken_gradient()
        if message.kind is Kind.SAMPLE:
            quality, below = self.stage.judge(message.batch, message.payload)
            if quality is not None:
                self.on_quality(quality)
            self._send_sample(message.batch, below)
            return
        relayed = self.stage.learn(message.item, message.payload)
        self.learned += 1
        self._send_gradient(message.item, relayed, awaited=False)

    def _taken_gradient(self) -> Message:
        message, self._gradient = self._gradient, None
        assert message is not None, "the policy took a gradient that is not there"
        return message

    def _item(self, number: int) -> Item:
        """The piece of work that is number ``number`` of all."""
        return Item(*divmod(number, self.microbatches))

    def _in_turn(self, what: str, item: Item, message: Message) -> Message:
        """The message, which must be about ``item``."""
        if message.item != item:
            found = f"got that of batch {message.item} from stage {message.stage}"
            raise StageError(f"expected the {what} of batch {item}, {found}", stage=self.stage.index, batch=item.batch)
        return message

    def _send_down(self, kind: Kind, item: Item, payload: Bundle = (), context: Bundle = ()) -> None:
        if self._down is not None:
            self.record(Span.SEND, item.batch)
            self._down.put(Message(kind, item, self.stage.index, payload, context))

    def _send_gradient(self, item: Item, gradient: Bundle | None, *, awaited: bool) -> None:
        if gradient is not None:
            message = Message(Kind.GRADIENT, item, self.stage.index, gradient)
            if self._up.gradient(message, awaited=awaited):
                self._tell_dropped()

    def _tell_dropped(self) -> None:
        """Tell the stage below that targets were dropped, so that it keeps nothing for them."""
        self._up.tell_dropped(min([self.updated, *self.stage.in_flight.relaying()]))

    def _send_sample(self, batch: int, gradient: Bundle | None) -> None:
        if gradient is not None:
            self._up.send(Message(Kind.SAMPLE, Item(batch), self.stage.index, gradient))


def _only(ends: Mapping[Edge, _End], what: What) -> _End | None:
    """The one end of a kind of edge; None where there is none."""
    found = [end for edge, end in ends.items() if edge.what == what]
    assert len(found) <= 1, f"a runner has one way for {what}"
    return next(iter(found), None)
