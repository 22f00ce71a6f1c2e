"""The plan: one frozen tree of settings from which a run follows. What can be wrong with one: ``check_plan``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from pipeline.plan.emulation import Emulation, Link
from pipeline.plan.goal import Goal
from pipeline.plan.names import DTYPES
from pipeline.schedule.modes import MODES

__all__ = ["ChannelPlan", "DNIPlan", "OptimizerPlan", "Plan", "Ties"]

_SHORT_STAGE_MS = 5.0  # an emulated link holds as many messages as stages of this length send meanwhile


@dataclass(frozen=True, kw_only=True)
class OptimizerPlan:
    """How every stage steps its own parameters. Each stage has its own optimizer of this kind."""

    rule: str = "adam"
    """The rule: sgd, adam, adamw or nadamw (torch.optim; nadamw is NAdam with decoupled weight decay)."""
    lr: float = 1e-3
    """Learning rate."""
    momentum: float | None = None
    """Momentum of sgd (0 by default) and nadamw (0.99); other optimizers refuse it."""
    weight_decay: float = 0.0
    """Weight decay (L2 for sgd and adam, decoupled for adamw and nadamw)."""
    clip: float | None = None
    """Scale a stage's gradient, true or synthetic, down to this norm; the norm is the stage's, so the split matters."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0 to lr, by equal amounts."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after that: constant, or down to 0 at the end of the run, linear or as half a cosine."""


@dataclass(frozen=True, kw_only=True)
class DNIPlan:
    """The synthetic gradient of every cut (design: Jaderberg et al. 2017, section 2, and label-aware forms)."""

    form: str = "auto"
    """What predicts the gradient: auto, linear, mlp, conv, label_residual or loss_model."""
    hidden: int | None = None
    """Hidden units (mlp, conv, loss_model). None: 128, but no hidden layer in a loss_model unless it gives images."""
    temperature: float | None = None
    """loss_model under cross-entropy of one class per row: what the outputs of the small model are divided by before a
    prediction, at least 1 (Hinton et al. 2015, arXiv 1503.02531, section 2). None: 2 at the uppermost cut if its stage
    has two weight matrices or more, elsewhere 1."""
    lr: float = 3e-3
    """Learning rate of the DNI's own Adam."""
    rows: float = 1.0
    """Fraction of a batch's rows the DNI trains on, in (0, 1]."""
    every: int | None = None
    """Targets flow, and the DNI trains on them, for every n-th batch; None: as the form wants (label_residual and
    loss_model 4, others 1)."""
    labels: bool = True
    """linear, mlp, conv: predict from activation and labels (the paper's cDNI); else from the activation alone."""
    factory: Callable[..., nn.Module] | None = None
    """A user's own DNI: factory(cut) -> module, module(h, labels) -> prediction shaped like h. Python only."""


@dataclass(frozen=True, kw_only=True)
class ChannelPlan:
    """The queues between stages."""

    slots: int = 4
    """Slots of every activation channel, the back-pressure: how many batches may wait at a cut."""
    gradient_slots: int | None = None
    """Slots of every gradient channel; None: as many as batches can be in flight. With fewer, targets of DNIs that find
    no room are dropped and counted; a gradient that a stage waits for never is."""
    wire_dtype: Literal["bf16"] | None = None
    """Round float32 activations and gradients to this dtype on their way: half the bytes; locked modes are then no
    longer exact. What replicas average travels as it is."""


@dataclass(frozen=True)
class Ties:
    """Weights that several stages compute with, as a head that is the embedding of the tokens.

    Attributes:
        stages: that have copies of them.
        names: of each weight, in the unsplit model.
        nbytes: of one copy of all.
    """

    stages: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. Frozen; ``check_plan`` raises one PlanError with all mistakes.

    The worker processes, the reference driver and torchrun all follow the same plan.
    """

    stages: int = 2
    """Number of stages, one worker process each."""
    replicas: int = 1
    """Number of pipelines, each of so many stages. In step i replica r trains on batch i * replicas + r. Locked modes
    average gradients before every step, and so equal training on the batches of a step together, but for BatchNorm,
    which sees its own replica's batch. The other modes average weights, see average_every."""
    average_every: int = 8
    """Replicas of modes that are not locked: steps of a stage from one average of its weights to the next. Nobody waits
    for an average but at the end of the run; what was learned meanwhile is kept."""
    ties: Ties | None = None
    """Weights that several stages have copies of; found in the model. Locked modes add up the gradients of all copies
    before every step, and so are exact; in the others the copies are averaged, as replicas are."""
    mode: str = "unlocked"
    """Who may update when: naive, gpipe, 1f1b (locked, exact), async-1f1b, local, or unlocked."""
    microbatches: int = 1
    """Modes gpipe and 1f1b: into how many microbatches a batch is cut."""
    in_flight: Literal["stages", "full"] = "stages"
    """Mode async-1f1b: open batches of stage 0, as many as stages, which waits where hops are slow (hop_steps), or as
    many as keep every stage busy, whose gradients are older."""
    steps: int | None = None
    """Training batches of each replica; None: what the recipe suggests."""
    seed: int = 0
    """Seed of the weights, of the data order and of everything random in a layer."""
    split: Literal["auto", "chain", "forward"] = "auto"
    """What is cut: the chain of layers that the model is, or the model's own forward, of which every stage runs a part;
    auto: the chain, where it is proved to be one."""
    sizes: tuple[int, ...] | None = None
    """Layers per stage, e.g. 1 3 2 2; None: balanced."""
    cuts: tuple[str, ...] | None = None
    """Name of the first layer of every stage but the first, instead of sizes."""
    balance: Literal["time", "layers"] = "time"
    """How to balance when neither sizes nor cuts are given: measured time per layer, or number of layers."""
    targets: str = "bootstrap"
    """What a stage sends down as target for the DNI below: bootstrap, true or mixed."""
    mix: float = 0.5
    """targets mixed: the lambda of BP(lambda), weight of the true gradient."""
    warmup_steps: int = 0
    """Unlocked: train locked on so many batches first, while the DNIs learn and nothing is updated from them."""
    unlock: Literal["always", "auto"] = "always"
    """Unlocked: always, or auto: each stage begins locked, unlocks when its DNI is good enough, and locks again when it
    is not; measured on every quality_every-th batch (20)."""
    unlock_cosine: float = 0.3
    """unlock auto: the mean cosine between the gradients of a stage's weights under the synthetic and the true gradient
    from which on it unlocks; below a third of it the stage locks again."""
    update_probability: float = 1.0
    """Unlocked and local: the chance that a stage updates from a batch; others it only passes on (the paper's p)."""
    optimizer: OptimizerPlan = field(default_factory=OptimizerPlan)
    """How a stage steps."""
    dni: DNIPlan = field(default_factory=DNIPlan)
    """What predicts the gradient."""
    channel: ChannelPlan = field(default_factory=ChannelPlan)
    """The queues."""
    channels: Literal["auto", "shm", "gloo", "cuda", "nccl"] = "auto"
    """What carries messages: shm (shared memory), gloo (TCP), cuda (memory of the GPU), nccl (from one GPU to another),
    or auto: the fastest that both workers can reach."""
    device: str = "auto"
    """Where workers compute: auto, cpu, cuda, or devices like cuda:0,cuda:1, shared out among the workers of a host.
    auto: the GPUs of every host, where each has one."""
    autocast: Literal["bf16"] | None = None
    """Compute layers in this dtype where torch.autocast does; weights and optimizer stay float32."""
    compile: bool = False
    """Compile every stage with torch.compile. Locked modes then equal a single process in distribution, not in bits."""
    deterministic: bool = False
    """Unlocked: take each gradient at the step at which the reference driver takes it, so that runs repeat exactly. On
    GPUs, in every mode: deterministic algorithms."""
    hop_steps: float = 0.0
    """Delay of one hop in the reference driver (and in deterministic runs), in steps of a stage."""
    evaluate_every: int | None = None
    """Evaluate after every n batches; None: only at the end, and with until 40 times."""
    quality_every: int | None = None
    """Unlocked: compare the synthetic gradients of every n-th batch with the true one; None: never. It costs each stage
    a copy of its weights and a second backward pass for such a batch."""
    until: str | None = None
    """End the run when held-out data shows accuracy=0.98 (at least) or loss=1.9 (at most); steps is then the most."""
    guard: bool = True
    """End a run whose loss, gradients or DNIs run away; what is not finite always ends it."""
    threads: int = 1
    """Compute threads of each worker."""
    spans: bool = True
    """Record what every worker does when; without it only throughput and loss are known of a run."""
    emulate: str | None = None
    """Replace compute by sleep: stage_ms=10 or stage_ms=10,dni_ms=0.2. Nothing is learned, and replicas have no weights
    to exchange; for seeing many stages."""
    link: str | None = None
    """Delay every message: latency_ms=50,bandwidth_mbps=100 (either may be left out)."""
    stall_after_s: float = 60.0
    """Seconds without any progress after which a run ends with a report of who waits for whom."""

    @property
    def workers(self) -> int:
        """Number of worker processes."""
        return self.stages * self.replicas

    @property
    def unlocked(self) -> bool:
        """Whether stages update from synthetic gradients."""
        return MODES[self.mode].gradient == "synthetic"

    @property
    def emulation(self) -> Emulation | None:
        """What replaces the compute, if anything."""
        return Emulation.parse(self.emulate, "emulate") if self.emulate is not None else None

    @property
    def links(self) -> Link | None:
        """What every channel is made to be like, if anything."""
        return Link.parse(self.link, "link") if self.link is not None else None

    @property
    def wire_dtype(self) -> torch.dtype | None:
        """What float32 activations and gradients are rounded to on their way, if to anything."""
        return DTYPES[self.channel.wire_dtype] if self.channel.wire_dtype is not None else None

    @property
    def goal(self) -> Goal | None:
        """What ends the run before its last batch, if anything."""
        return Goal.parse(self.until, "until") if self.until is not None else None

    @property
    def activation_slots(self) -> int:
        """Slots of an activation channel: as planned, and room for what an emulated link has on its way."""
        if self.links is None:
            return self.channel.slots
        stage_ms = self.emulation.stage_ms if self.emulation else _SHORT_STAGE_MS
        return self.channel.slots + math.ceil(self.links.latency_ms / max(stage_ms, _SHORT_STAGE_MS))

    def gradient_slots_at(self, cut: int) -> int:
        """Slots of the gradient channel of a cut: as planned, or enough for every batch whose gradient is under way.

        A gradient comes from as many stages above as its target travels through; each holds ``slots`` batches in its
        activation channel and works on one more. Schedules with microbatches, or one open batch per stage, need as
        many. One more slot takes the END.
        """
        if self.channel.gradient_slots is not None:
            return self.channel.gradient_slots
        stages_above = 1 if self.targets == "bootstrap" else self.stages - 1 - cut
        samples = 0 if self.quality_every is None else self.stages * (self.activation_slots + 1)
        return max(stages_above * (self.activation_slots + 1), self.microbatches, self.stages) + 2 + samples

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values; a factory appears by its name."""
        values = dataclasses.asdict(self)
        factory = self.dni.factory
        values["dni"]["factory"] = None if factory is None else getattr(factory, "__qualname__", repr(factory))
        return values
