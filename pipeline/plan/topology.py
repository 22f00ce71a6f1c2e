"""Topology as data: who sends what to whom.

loader --> stage 0 --activations, cut 0--> stage 1 --activations, cut 1--> stage 2      a chain, once per replica
                   <--gradients, cut 0----         <--gradients, cut 1----

every stage of several replicas:   replica r  --averages, stage k-->  replica q         for every two, both ways
stages that share weights:         stage k    --averages, stage k-->  stage l           likewise
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

from pipeline.plan.plan import Plan
from pipeline.plan.replica_layout import worker_of

__all__ = ["LOADER", "Edge", "What", "data_edge", "edges_of", "name_of"]

LOADER = -1
"""Stands for a worker where the data comes from."""
What = Literal["activations", "gradients", "averages"]


class Edge(NamedTuple):
    """One direction between two workers, by their numbers; the source may be ``LOADER``."""

    source: int
    target: int
    what: What
    cut: int
    """Index of the cut it crosses; of averages the stage they are of; ``LOADER`` where it comes from the data."""


def edges_of(plan: Plan) -> Iterator[Edge]:
    """All edges between the workers of a run, in the one order in which every process opens its own."""
    for replica in range(plan.replicas):
        for cut in range(plan.stages - 1):
            below = worker_of(plan, replica, cut)
            yield Edge(below, below + 1, "activations", cut)
            yield Edge(below + 1, below, "gradients", cut)
    for stage in range(plan.stages):
        for one, other in itertools.permutations(range(plan.replicas), 2):
            yield Edge(worker_of(plan, one, stage), worker_of(plan, other, stage), "averages", stage)
    for one, other in itertools.permutations(plan.ties.stages if plan.ties else (), 2):
        yield Edge(worker_of(plan, 0, one), worker_of(plan, 0, other), "averages", one)


def data_edge(plan: Plan, replica: int) -> Edge:
    """The edge on which the data comes into the first stage of a replica."""
    return Edge(LOADER, worker_of(plan, replica, 0), "activations", LOADER)


def name_of(edge: Edge, plan: Plan) -> str:
    """What errors call an edge: ``gradients 1->0``, ``averages 0->1 of stage 2``."""
    source, target = (divmod(worker, plan.stages) for worker in (edge.source, edge.target))
    if edge.what == "averages" and plan.ties:
        return f"shared weights {source[1]}->{target[1]}"
    if edge.what == "averages":
        return f"averages {source[0]}->{target[0]} of stage {edge.cut}"
    return f"{edge.what} {source[1]}->{target[1]}" + (f" of replica {source[0]}" if plan.replicas > 1 else "")
