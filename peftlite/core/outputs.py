"""What methods add to the output of a whole model, such as a term to its loss; the same in both shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.call import current
from peftlite.core.transaction import keep_all
from peftlite.core.tree import base_model_of, find_state
from peftlite.core.variant import TunerSpec, tuner_for


def attach(model: nn.Module, tuner: TunerSpec) -> None:
    """Have `tuner.after_forward`, if it has one, called after each forward of the base model."""
    base = base_model_of(model)
    if tuner.after_forward is not None and after_forward not in base._forward_hooks.values():
        keep_all(base._forward_hooks)
        base.register_forward_hook(after_forward)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    hooks = base_model_of(model)._forward_hooks
    keep_all(hooks)
    for key in [key for key, hook in hooks.items() if hook is after_forward]:
        del hooks[key]


def after_forward(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: the adapters in use may change the output, while gradients are recorded."""
    if not torch.is_grad_enabled() or (isinstance(output, Tensor) and torch.compiler.is_compiling()):
        return None
    state = find_state(module)
    if state is None or not state.enabled:
        return None
    call = current()
    call = None if call is None else call.of(state)
    for name in state.active if call is None else call.names:
        method = tuner_for(state.configs[name]).after_forward
        if method is not None:
            output = method(module, state, name, output)
    return output
