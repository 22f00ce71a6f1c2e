"""A model that is no chain is run in parts by its own forward; the parts compute what the whole does, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pipeline import PlanError
from pipeline.messages.bundle import as_bundle
from pipeline.model.segment import Segment, Trace, trace
from pipeline.model.units import units_of


class Flattens(nn.Module):
    """As torchvision's networks: functions of torch between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.norm(self.conv(x)), inplace=True), 1))


class LongSkips(nn.Module):
    """A U-Net: what the first layers give is used by the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            x = F.relu(layer(x))
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = F.relu(self.middle(x))
        for layer in self.up:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1))
        return x


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        h = self.norm(x) * angles[0] + angles[1]
        return x + self.out(F.gelu(self.mix(h)).masked_fill(~mask[..., None], 0.0)), h.shape[1]


class Rotary(nn.Module):
    """A constant buffer that every block uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(1, width + 1) / width, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * self.steps
        return angles.cos(), angles.sin()


class Tokens(nn.Module):
    """A transformer's plan: named inputs, a mask, a shared constant, a parameter of its own, an output of two names."""

    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.start = nn.Parameter(torch.randn(width))
        self.rotary = Rotary(width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 11)

    def forward(self, *, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids) + self.start
        mask = torch.ones_like(ids) if mask is None else mask
        if bool((mask == 0).all()):
            raise ValueError("nothing to see")
        angles = self.rotary(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x, _ = block(x, mask.bool(), angles)
        return {"logits": self.head(x), "pooled": x.mean(1)}


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = nn.Linear(6, 4), nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.left(a), self.right(b)
        return self.both(torch.cat([left, right], -1)), left - right


class Noisy(nn.Module):
    """Dropout and noise between the layers, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.one(x), 0.5, self.training)
        x = self.two(x)
        if self.training:
            x = x + torch.randn_like(x)
        return self.three(x)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.tag = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, (h, _) = self.lstm(self.embed(x))
        return self.tag(out + h[-1][:, None])


IDS = torch.arange(4 * 6).reshape(4, 6) % 11
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class TiedByHand(nn.Module):
    """The output is read with the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.mix(self.embed(x)), self.embed.weight)


class FrozenStart(nn.Module):
    """A frozen parameter of its own is put before the rows, as a class token is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 2)
        self.start = nn.Parameter(torch.randn(1, 1, 6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h = torch.cat([self.start.expand(len(h), -1, -1), h[:, None]], 1)
        return self.two(h).mean(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "flattens": (Flattens, (IMAGES,), {}),
    "long skips": (LongSkips, (IMAGES,), {}),
    "tokens": (Tokens, (), {"ids": IDS}),
    "tokens and mask": (Tokens, (), {"ids": IDS, "mask": (IDS % 5 > 0).long()}),
    "two branches": (TwoBranches, (torch.randn(4, 6), torch.randn(4, 3)), {}),
    "noisy": (Noisy, (torch.randn(4, 6),), {}),
    "tagger": (Tagger, (IDS,), {}),
    "frozen start": (FrozenStart, (torch.randn(4, 6),), {}),
    "tied by hand": (TiedByHand, (IDS,), {}),
}


def parts(model: nn.Module, known: Trace, count: int) -> list[Segment]:
    edges = [round(place * len(known.names) / count) for place in range(count + 1)]
    return [Segment(model, known, a, b - 1) for a, b in pairwise(edges)]


def through(segments: list[Segment], inputs: list[Tensor]) -> tuple[Any, list[tuple[Any, Any]]]:
    value: Any = tuple(inputs) if len(inputs) > 1 else inputs[0]
    calls = []
    for segment in segments:
        x = tuple(each.detach().requires_grad_(each.requires_grad) for each in as_bundle(value))
        for each in x:
            if each.requires_grad:
                each.register_hook(partial(setattr, each, "given"))
        value = segment(x if len(x) > 1 else x[0])
        calls.append((x, value))
    return value, calls


def natural(x: Tensor) -> Tensor | None:
    """The gradient as autograd gave it; ``x.grad`` has the strides of x, by which kernels round."""
    return getattr(x, "given", None)


def backward(calls: list[tuple[Any, Any]], gradients: list[Tensor]) -> None:
    below: list[Any] = gradients
    for x, value in reversed(calls):
        outputs = [each for each in tree_leaves(value) if isinstance(each, Tensor)]
        pairs = [(h, g) for h, g in zip(outputs, below, strict=True) if h.requires_grad and g is not None]
        torch.autograd.backward([h for h, _ in pairs], [g for _, g in pairs])
        below = [natural(each) for each in x]


@pytest.mark.parametrize("rows", [4, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_part_computes_what_the_whole_does(name: str, training: bool, rows: int) -> None:
    make, args, kwargs = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    known = trace(model, args, kwargs)
    args, kwargs = tree_map(lambda each: each[:rows] if isinstance(each, Tensor) else each, (args, kwargs))
    for count in range(1, len(known.names) + 1):
        alone, split = copy.deepcopy(model).train(training), copy.deepcopy(model)
        segments = [segment.train(training) for segment in parts(split, known, count)]
        torch.manual_seed(3)
        expected = alone(*args, **kwargs)
        torch.manual_seed(3)
        found, calls = through(segments, [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)])
        assert type(found) is type(expected)
        ours, theirs = tree_leaves(found), tree_leaves(expected)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), count
        gradients = [torch.randn_like(each) for each in theirs]
        torch.autograd.backward(theirs, gradients)
        backward(calls, gradients)
        assert {name for part in segments for name in part.state_dict()} == set(model.state_dict())
        for (path, p), q in zip(alone.named_parameters(), split.parameters(), strict=True):
            assert (p.grad is None) is not p.requires_grad, path
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), (count, path)
        assert all(torch.equal(a, b) for a, b in zip(alone.buffers(), split.buffers(), strict=True))


def test_longer_sequences_than_the_traced_ones_pass_through() -> None:
    torch.manual_seed(0)
    model = Tokens().train()
    known = trace(model, (), {"ids": IDS, "mask": torch.ones_like(IDS)})
    segments = parts(copy.deepcopy(model), known, 4)
    for length in (3, 9, 6, 9):
        ids = torch.arange(2 * length).reshape(2, length) % 11
        expected = model(ids=ids, mask=torch.ones_like(ids))
        found, _ = through(segments, [ids, torch.ones_like(ids)])
        assert torch.equal(found["logits"], expected["logits"])


def test_microbatches_of_as_many_rows_as_there_were_positions_pass_through() -> None:
    """Sizes that grow with the batch are told from those that only happened to be equal to its rows."""
    torch.manual_seed(0)
    model, ids = Tokens().train(), torch.arange(36).reshape(6, 6) % 11
    segments = parts(copy.deepcopy(model), trace(model, (), {"ids": ids, "mask": torch.ones_like(ids)}), 3)
    for rows in (2, 6):
        given = [ids[:rows], torch.ones_like(ids[:rows])]
        found, _ = through(segments, given)
        assert torch.equal(found["logits"], model(ids=given[0], mask=given[1])["logits"])


def test_a_cut_is_where_the_least_crosses() -> None:
    """Behind what has no parameters; of two tensors that could cross, the smaller; constants are computed anew."""
    known = trace(Flattens().train(), (IMAGES,), {})
    assert [[given.shape for given in crossing(known, name)] for name in ("norm", "fc")] == [[(7, 4, 6, 6)], [(7, 144)]]
    known = trace(Tokens().train(), (), {"ids": IDS})
    assert [given.shape for given in crossing(known, "blocks.1")] == [(7, 6), (7, 6, 8)], "the ids, for the mask"
    known = trace(LongSkips().train(), (IMAGES,), {})
    assert [given.shape[2] for given in crossing(known, "middle")] == [8, 4], (
        "pooling what the skip needs is done again"
    )


def crossing(known: Trace, name: str) -> list[Any]:
    entry = known.entries[True][list(known.names).index(name)]
    assert entry is not None
    return [known.recordings[True].given(ref) for ref in entry.live]


def test_units_are_blocks_and_not_what_is_in_them() -> None:
    assert list(units_of(Tokens())) == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert list(units_of(LongSkips())) == ["down.0", "down.1", "middle", "up.0", "up.1"]


class Reads(nn.Module):
    """Python looks at what the first layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.three(self.two(h if h.sum() < 1e9 else -h))


class Writes(Reads):
    """It writes into what the first layer gives and uses that further up."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).clone()
        h[:, 0] = 0.0
        return self.three(self.two(h)) + h


@pytest.mark.parametrize("make", [Reads, Writes])
def test_no_cut_where_the_stage_above_could_not_follow(make: Callable[[], nn.Module]) -> None:
    known = trace(make().train(), (torch.randn(4, 3),), {})
    assert known.names == ["one", "two"], "a cut before three would need what was read, or written, two layers below"


class Chooses(nn.Module):
    """The batch says which of two layers' results is used above."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.above = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        a, b = self.one(x), self.other(x)
        return self.above(a if bool(flag[0] > 0) else b)


def test_what_did_not_cross_is_missed_and_not_taken_for_zeros() -> None:
    x, flags = torch.randn(4, 3), torch.ones(4)
    model = Chooses().train()
    segments = parts(model, trace(model, (x, flags), {}), 3)
    assert torch.equal(through(segments, [x, flags])[0], model(x, flags))
    with pytest.raises(PlanError, match="above takes something else than on batch 0, which lies below the cut"):
        through(segments, [x, -flags])


def test_a_model_of_one_layer_is_one_part() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x) * 2

    assert trace(One().train(), (torch.randn(4, 3),), {}).names == ["only"]
    with pytest.raises(PlanError, match=r"ReLU.forward calls no layer with parameters"):
        trace(nn.ReLU().train(), (torch.randn(4, 3),), {})


def test_a_forward_that_goes_another_way_later_says_so() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.calm = nn.Linear(3, 3), nn.Linear(3, 3), True

        def forward(self, x: Tensor) -> Tensor:
            h = self.one(x)
            return self.two(h.relu() if self.calm else h.tanh())

    model = Moody().train()
    segment = Segment(model, trace(model, (torch.randn(4, 3),), {}), 0, 0)
    model.calm = False
    with pytest.raises(PlanError, match=r"something else than on batch 0: tanh where .*relu was"):
        segment(torch.randn(4, 3))
