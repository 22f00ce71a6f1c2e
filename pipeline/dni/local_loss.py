"""A stage's own loss, for the mode `local`: no gradient crosses the cut at all.

    h --head C--> output' --the user's loss(., labels)--> L        dL/dh updates the stage, dL/dC the head, at once

Greedy training of layers with local losses: Belilovsky et al. 2020; Nøkland and Eidnes 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.dni.heads import head_for
from pipeline.model.cut import Cut
from pipeline.model.unwritten import Unwritten
from pipeline.plan.plan import DNIPlan
from pipeline.seeding import seeded
from pipeline.state import State, load_module, module_state, plain

__all__ = ["LocalLoss"]


class LocalLoss(nn.Module):
    """A small head with the shape of the network's output, trained on the stage's activation."""

    def __init__(self, cut: Cut, plan: DNIPlan, seed: int) -> None:
        super().__init__()
        self._loss = Unwritten(cut.loss)
        with seeded(seed, "local", cut.index):
            self.head = head_for(cut, plan.hidden)
        self._trained = list(self.head.parameters())
        self.optimizer = torch.optim.Adam(self._trained, lr=plan.lr, fused=True)

    def meet(self, h: Tensor, labels: Tensor, batch: int) -> Tensor:
        """The gradient of the local loss at ``h`` [batch, ...]; trains the head on the way, with the same backward."""
        leaf = h.detach().to(self._trained[0].dtype).requires_grad_()
        gradient, *of_head = torch.autograd.grad(self._loss(self.head(leaf), labels), [leaf, *self._trained])
        for parameter, grad in zip(self._trained, of_head, strict=True):
            parameter.grad = grad
        self.optimizer.step()
        return gradient.to(h.dtype)

    def state(self) -> State:
        return {"module": module_state(self), "optimizer": plain(self.optimizer.state_dict())}

    def load_state(self, state: State) -> None:
        load_module(self, state["module"])
        self.optimizer.load_state_dict(plain(state["optimizer"]))
