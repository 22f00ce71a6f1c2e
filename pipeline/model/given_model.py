"""The model as ``model()`` gives it: one module or a list of modules, with values, and in which mode each of them is.

A module may be in evaluation mode on purpose, as a frozen batch normalisation is, so it trains as it came:

model() -> check_model -> model.train(), own overrides included -> what came in evaluation mode goes back there
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pipeline.errors import PlanError

__all__ = ["ModuleModes", "check_model", "copy_of", "hooks_of", "in_training_mode", "overrides"]

_Model = TypeVar("_Model", bound=nn.Module | Sequence[nn.Module])


class ModuleModes:
    """Switches a module and all inside of it between evaluation mode and the modes they are in now, of training."""

    def __init__(self, root: nn.Module) -> None:
        self._root, self._training = root, True
        self._given = [(module, module.training) for module in root.modules()]

    def switch(self, training: bool) -> None:
        """Into training (True) or evaluation; a module's own ``train()`` is called. Free where nothing changes."""
        if training is self._training:
            return
        self._root.train(training)
        for module, was in self._given if training else ():
            module.training = was
        self._training = training


def in_training_mode(model: _Model) -> _Model:
    """Put every module into the mode it trains in: as ``train()`` leaves it, unless it came in evaluation mode."""
    given = [(module, module.training) for root in _roots(model) for module in root.modules()]
    for root in _roots(model):
        root.train()
    for module, was in given:
        module.training = module.training and was
    return model


def check_model(given: Any) -> None:
    """Refuse what ``model()`` gave if it is no module and no list of modules, or a tensor in it has no values yet."""
    is_list = isinstance(given, list) and all(isinstance(item, nn.Module) for item in given)
    if not (is_list or isinstance(given, nn.Module)):
        raise PlanError(f"model() gives {_wrong(given)}: return one nn.Module, or a list of nn.Modules.")
    if problems := list(_without_values(given)):
        raise PlanError(*problems)


def copy_of(model: _Model) -> _Model:
    """A deep copy, also of modules with the old ``torch.nn.utils.weight_norm``; PlanError where it cannot be made."""
    computed = {  # copy refuses a tensor that has a graph; a hook computes it anew before it is used
        id(value): value.detach().clone()
        for root in _roots(model)
        for module in root.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:
        raise PlanError(
            f"the model cannot be copied for a trial run ({type(error).__name__}: {error}): keep what cannot be copied "
            "out of it."
        ) from error


def overrides(module: nn.Module, *names: str) -> bool:
    """Whether a module has methods of its own instead of ``nn.Module``'s, in its class or set on itself."""
    return any(name in vars(module) or getattr(type(module), name) is not getattr(nn.Module, name) for name in names)


def hooks_of(module: nn.Module) -> list[object]:
    """What is called before and after a module's forward and backward pass, when the module itself is called."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def _roots(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    return [model] if isinstance(model, nn.Module) else list(model)


def _wrong(given: Any) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__} instead of an instance, {given.__name__}(...)"
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__} of {', '.join(type(item).__name__ for item in given[:9]) or 'nothing'}"
    return "None, as a function without return does" if given is None else f"a {type(given).__name__}"


def _without_values(model: nn.Module | Sequence[nn.Module]) -> Iterator[str]:
    """Lazy modules before their first batch, and what is on the device ``meta``."""
    for index, root in enumerate(_roots(model)):
        for prefix, module in root.named_modules(prefix="" if root is model else str(index)):
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                full = f"{prefix}.{name}" if prefix else name
                if is_lazy(tensor):
                    yield (
                        f"{full} of {type(module).__name__} has no shape before a first batch: give the module its "
                        "sizes, or run one batch through the model at the end of model()."
                    )
                elif tensor.is_meta:
                    yield f"{full} has no values (device meta): give it some in model(), on the CPU."
