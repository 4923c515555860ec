"""torch.compile: how many graphs it takes to run all adapters of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch

import peftlite
from benchmarks.harness import Row
from benchmarks.models import STACK, Stack


def rows(quick: bool) -> Iterator[Row]:
    count = 3 if quick else 12
    names = [f"n{k}" for k in range(count)]
    fields: dict[str, Any] = {"r": 4, "target_modules": STACK}
    theirs = peft.get_peft_model(Stack(16), peft.LoraConfig(**fields), names[0])
    ours = peftlite.get_peft_model(Stack(16), peftlite.LoraConfig(**fields), names[0])
    for name in names[1:]:
        theirs.add_adapter(name, peft.LoraConfig(**fields))
        ours.add_adapter(name, peftlite.LoraConfig(**fields))
    used = {
        name: graphs(model, [lambda n=n, m=model: m.set_adapter(n) for n in names])  # type: ignore[misc]
        for name, model in (("peft", theirs), ("ours", ours))
    }
    yield Row(
        f"graphs over {count} adapters of one rank", "", used["ours"], used["peft"], 1, 1.0, goal_is_to_floor=True
    )


@torch.no_grad()
def graphs(model: torch.nn.Module, switches: list[Callable[[], object]]) -> int:
    """Graphs compiled while the model runs once after each switch."""
    made: list[object] = []

    def backend(module: torch.fx.GraphModule, example: object) -> Callable[..., Any]:
        made.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 16)
    for switch in switches:
        switch()
        compiled(x)
    return len(made)
