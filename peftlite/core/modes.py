"""Eval mode, without a look at every module of every adapter: there may be very many."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn

from peftlite.core.layer import AdapterLayer
from peftlite.core.transaction import on_failure


def evaluate(model: nn.Module) -> None:
    """`model.eval()`, to be taken back; without visiting what has no children and is in eval mode already.

    Adapters that are not in use have the mode in which their layer was when they were added, or that it was put into
    since. Single modules of theirs that were put into another by hand are left in it.
    """
    changed: list[nn.Module] = []
    on_failure(partial(_train_again, changed))
    stack = [model]
    while stack:
        module = stack.pop()
        if type(module).train is not nn.Module.train:  # a method of its own, which may do more
            if is_training(module):
                changed += [one for one in module.modules() if one.training]
                module.train(False)
            continue
        if module.training:
            changed.append(module)
            module.training = False
            stack += [child for child in module._modules.values() if child is not None]
        else:
            stack += _of_interest(module)


def _train_again(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.training = True


def is_training(model: nn.Module) -> bool:
    """Whether anything in a model is in training mode, of adapters only those in use."""
    stack = [model]
    while stack:
        module = stack.pop()
        if module.training:
            return True
        stack += _of_interest(module)
    return False


def _of_interest(module: nn.Module) -> list[nn.Module]:
    """The children of a module in eval mode that are, or may have in them, modules in training mode."""
    if not isinstance(module, AdapterLayer):
        return [child for child in module._modules.values() if child is not None and (child.training or child._modules)]
    found, names = [module.wrapped], module.active_adapters
    for slot in module.tuner.slots:
        container = module.container(slot.name)
        if container.training:
            found.append(container)
        elif held := container._modules:
            found += [one for name in names if (one := held.get(name)) is not None and (one.training or one._modules)]
    return found
