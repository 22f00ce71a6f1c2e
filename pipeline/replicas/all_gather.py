"""How the replicas of one stage give each other what is to be averaged: everybody everything, round after round.

    replica 0   share 0.0 ------+---> share 0.1 ----     a round: own share out, R - 1 others in;
    replica 1   share 1.0 --+---+---> share 1.1 ----     only then may the next one begin

Nothing here blocks. All replicas add up the same shares in the same order, so their sums are equal to the last bit. A
replica that will give nothing more says so with its last share; the others give up a round that they are still in when
they come to their own last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.errors import StageError
from pipeline.messages.bundle import Item
from pipeline.messages.message import Kind, Message
from pipeline.messages.queue_ends import Inlet, Outlet
from pipeline.plan.plan import Plan
from pipeline.plan.topology import Edge

__all__ = ["ROOM", "AllGather", "Packing", "gathering"]

ROOM = 3
"""Messages from one replica to another that can wait at any time: of the round before, of this one, and the last."""


class AllGather:
    """One replica's end, with a queue to and from each of the others, by replica."""

    def __init__(self, stage: int, replica: int, outlets: Mapping[int, Outlet], inlets: Mapping[int, Inlet]) -> None:
        self._stage, self._replica, self._outlets, self._inlets = stage, replica, outlets, inlets
        self._own: Message | None = None
        self._unsent: list[tuple[Outlet, Message]] = []
        self._come: dict[int, Message] = {}  # the others' shares of this round
        self._last: dict[int, Message] = {}
        self.round = 0  # the one that is open or comes next

    @property
    def open(self) -> bool:
        """Whether the own share is out and the round not yet over."""
        return self._own is not None

    @property
    def ready(self) -> bool:
        """Whether all shares of the round are here and the own one has left."""
        return self._own is not None and not self._unsent and self._theirs().keys() == self._inlets.keys()

    def offer(self, tensors: tuple[Tensor, ...], *, last: bool = False) -> None:
        """Give the others a share, and begin a round; a last share gives up the round that is open.

        The tensors must stay as they are until the round is over.
        """
        assert last or self._own is None, "a round is open"
        self._own = Message(Kind.LAST_SHARE if last else Kind.SHARE, Item(self.round), self._replica, tensors)
        self._come.clear()
        self._unsent += [(outlet, self._own) for outlet in self._outlets.values()]
        self.poll()

    def poll(self) -> None:
        """Send what finds room, take what has come for this round."""
        waiting, self._unsent = self._unsent, []
        for outlet, message in waiting:
            if outlet.room() and not any(outlet is other for other, _ in self._unsent):
                outlet.put(message)
            else:
                self._unsent.append((outlet, message))
        for replica, inlet in self._inlets.items():
            while self._awaits(replica) and (came := inlet.take()) is not None:
                self._file(replica, came)

    def shares(self) -> list[tuple[Tensor, ...]]:
        """End the round: the shares of all replicas, in the order of the replicas."""
        assert self.ready, "the round is not over"
        assert self._own is not None
        all_of_them = {self._replica: self._own, **self._theirs()}
        self._own, self._come = None, {}
        self.round += 1
        return [all_of_them[replica].tensors for replica in sorted(all_of_them)]

    def _theirs(self) -> dict[int, Message]:
        return self._last if self._own is not None and self._own.kind is Kind.LAST_SHARE else self._come

    def _awaits(self, replica: int) -> bool:
        return self._own is not None and replica not in self._last and replica not in self._theirs()

    def _file(self, replica: int, message: Message) -> None:
        assert self._own is not None
        mine = [(tensor.shape, tensor.dtype) for tensor in self._own.tensors]
        theirs = [(tensor.shape, tensor.dtype) for tensor in message.tensors]
        if message.kind is Kind.LAST_SHARE:
            self._last[replica] = message
        elif self._own.kind is Kind.LAST_SHARE:
            return  # of a round that is given up
        elif (message.batch, theirs) != (self.round, mine):
            raise StageError(
                f"replica {self._replica} expected share {self.round} of the tensors {mine} from replica {replica}, "
                f"got share {message.batch} of {theirs}: does the recipe build the same model in every process?",
                stage=self._stage,
            )
        else:
            self._come[replica] = message


def gathering(
    plan: Plan, stage: int, replica: int, inlets: Mapping[Edge, Inlet], outlets: Mapping[Edge, Outlet]
) -> AllGather:
    """The end of a stage of a replica, on those of its edges that carry averages: with the same stage of the other
    replicas, or with the stages that it shares weights with.
    """
    place = plan.stages if plan.ties is None else 1  # by replica, or by stage
    to = {edge.target // place: outlet for edge, outlet in outlets.items() if edge.what == "averages"}
    come = {edge.source // place: inlet for edge, inlet in inlets.items() if edge.what == "averages"}
    return AllGather(stage, replica if plan.ties is None else stage, to, come)


class Packing:
    """Tensors of given shapes as one vector per dtype: few parts of a message, few operations."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tensor.shape for tensor in tensors]
        self._groups: dict[torch.dtype, list[int]] = {}
        for index, tensor in enumerate(tensors):
            self._groups.setdefault(tensor.dtype, []).append(index)

    def packed(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Copies of the tensors, end to end: one vector per dtype."""
        groups = self._groups.values()
        return tuple(torch.cat([tensors[index].detach().flatten() for index in group]) for group in groups)

    def unpacked(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors again, as views into the vectors."""
        tensors: dict[int, Tensor] = {}
        for group, vector in zip(self._groups.values(), vectors, strict=True):
            parts = vector.split([self._shapes[index].numel() for index in group])
            tensors.update((index, part.view(self._shapes[index])) for index, part in zip(group, parts, strict=True))
        return [tensors[index] for index in range(len(self._shapes))]
