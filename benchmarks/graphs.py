"""torch.compile: how many graphs it takes to run all adapters of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from torch import Tensor

import peftlite
from benchmarks.harness import Goal, Row, amounts, same
from benchmarks.models import STACK, Stack, given_numbers


def rows(quick: bool) -> Iterator[Row]:
    count = 3 if quick else 12
    names = [f"n{k}" for k in range(count)]
    fields: dict[str, Any] = {"r": 4, "target_modules": STACK}
    base = Stack(16)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**fields), names[0])
    ours = peftlite.get_peft_model(Stack(16), peftlite.LoraConfig(**fields), names[0])
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**fields))
        ours.add_adapter(name, peftlite.LoraConfig(**fields))
    theirs.load_state_dict(given_numbers(theirs))
    ours.load_state_dict(theirs.state_dict())
    (their_graphs, their_y), (our_graphs, our_y) = graphs(theirs, names), graphs(ours, names)
    checked = same(their_y, our_y, 1e-4)
    used = amounts({"floor": 1, "peft": their_graphs, "peftlite": our_graphs})
    yield Row(f"graphs over {count} adapters of one rank", "", used, (Goal(1, "floor"),), checked)


@torch.no_grad()
def graphs(model: Any, names: list[str]) -> tuple[int, Tensor]:
    """Graphs compiled while the model runs once after each switch, and all the outputs."""
    made: list[object] = []

    def backend(module: torch.fx.GraphModule, example: object) -> Callable[..., Any]:
        made.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    x = torch.linspace(-1, 1, 32).view(2, 16)
    outputs = []
    for name in names:
        model.set_adapter(name)
        outputs.append(compiled(x))
    return len(made), torch.stack(outputs)
