"""What AdaLoRA does while it trains: measures how important triplets are, and gives the ranks to those that are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import state_of
from peftlite.core.state import AdapterState
from peftlite.core.transaction import atomic, keep, keep_all, keep_values, put
from peftlite.core.tree import named_layers
from peftlite.errors import StateError, warn
from peftlite.tuners.adalora.config import AdaLoraConfig, pattern_key

FACTORS: Final = ("lora_A", "lora_B", "lora_E")


@dataclass
class Watch:
    """Counts how often one layer's E changed between forward passes, without waiting for the device each time."""

    seen: Tensor
    changes: Tensor
    forwards: int = 0
    look_after: int = 0

    def steps(self, E: Tensor, most: int) -> int:
        """The changes so far, at least where there may be more than `most`."""
        self.changes += (self.seen != E).any()
        self.seen.copy_(E)
        self.forwards += 1
        if self.forwards <= self.look_after:
            return 0
        steps = int(self.changes)
        self.look_after = self.forwards + most - steps
        return steps


@dataclass
class Allocation:
    """What the training of an adapter has shown so far; by path and slot."""

    importance: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """|w dL/dw|, smoothed."""
    uncertainty: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """How far |w dL/dw| is from that, smoothed."""
    kept: dict[str, list[bool]] = field(default_factory=dict)
    """Which of the triplets that layers have were left by the last allocation; empty before."""
    watch: Watch | None = None
    is_watched: bool = True
    """Whether `update_and_allocate` was not called yet, and nobody was told so."""

    def learn(self, key: tuple[str, str], parameter: nn.Parameter, config: AdaLoraConfig) -> None:
        """Take in the gradient of one parameter."""
        now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
        old, spread = self.importance.get(key, torch.zeros_like(now)), self.uncertainty.get(key, torch.zeros_like(now))
        self.importance[key] = smooth = config.beta1 * old + (1 - config.beta1) * now
        self.uncertainty[key] = config.beta2 * spread + (1 - config.beta2) * (now - smooth).abs()

    def scores(self, path: str) -> Tensor:
        """How important a layer's triplets are (r,): E's numbers, and A's rows and B's columns on average."""
        A, B, E = (self.importance[path, slot] * self.uncertainty[path, slot] for slot in FACTORS)
        return E.flatten() + (A.mean(dim=1) + B.mean(dim=0))


@atomic
@torch.no_grad()
def update_and_allocate(model: nn.Module, global_step: int) -> None:
    """Between `optimizer.step()` and `zero_grad()`: measure importance, and choose triplets when it is time to.

    For any model with an AdaLoRA adapter that trains, wrapped or not. `global_step` counts optimizer steps, from 1.

    Raises: StateError if no AdaLoRA adapter trains, or several, or there are no gradients; NoAdapterError.
    """
    state = state_of(model)
    name = training_adapter(state)
    config: Any = state.configs[name]
    parameters: dict[tuple[str, str], Any] = {
        (path, slot): layer.container(slot)[name] for path, layer in adapted(model, name) for slot in FACTORS
    }
    if name not in state.memory:
        put(state.memory, name, Allocation())
    memory: Allocation = state.memory[name]
    keep(memory.__dict__, *memory.__dict__)
    keep_all(memory.importance)
    keep_all(memory.uncertainty)
    is_last = global_step == config.last_allocation or (global_step > config.last_allocation and not memory.kept)
    if global_step < config.last_allocation or (is_last and not memory.importance):
        if all(parameter.grad is None for parameter in parameters.values()):
            raise StateError(
                "`update_and_allocate` finds no gradients: call it before `zero_grad()`. Nothing was changed."
            )
        for key, parameter in parameters.items():
            memory.learn(key, parameter, config)
    memory.is_watched = False
    numbers = {path: parameter for (path, slot), parameter in parameters.items() if slot == "lora_E"}
    masks = memory.kept
    if is_last or config.allocates_at(global_step):
        full = sum(map(len, numbers.values()))
        masks = chosen(memory, list(numbers), full - config.budget(global_step, full, config.target_r * len(numbers)))
    if is_last:
        memory.kept, memory.importance, memory.uncertainty = masks, {}, {}
        put(config.__dict__, "rank_pattern", joined(config, masks))
    for path, E in numbers.items():
        if pattern_key(path) in masks:
            keep_values(E)
            E.masked_fill_(~torch.tensor(masks[pattern_key(path)], device=E.device)[:, None], 0.0)


def chosen(memory: Allocation, paths: list[str], count: int) -> dict[str, list[bool]]:
    """Which triplets are left when the `count` least important ones are taken away."""
    scores = {path: memory.scores(path) for path in paths}
    every = torch.cat([score.cpu() for score in scores.values()])
    limit = float(torch.kthvalue(every, count)[0]) if count > 0 else -1.0
    return {pattern_key(path): (score > limit).tolist() for path, score in scores.items()}


def joined(config: AdaLoraConfig, masks: dict[str, list[bool]]) -> dict[str, list[bool]]:
    """The masks for triplets as they were at first, also if the adapter came from a file and had lost some already."""
    result = {}
    for key, mask in masks.items():
        before, left = (config.rank_pattern or {}).get(key, mask), iter(mask)
        result[key] = mask if len(before) == len(mask) else [was and next(left) for was in before]
    return result


def training_adapter(state: AdapterState) -> str:
    """The AdaLoRA adapter that trains.

    Raises: StateError if none does, or several do.
    """
    names = list(training_adapters(state))
    if len(names) != 1:
        raise StateError(
            f"`update_and_allocate` is about the one AdaLoRA adapter that is active and trainable; of this model, "
            f"{' and '.join(f'`{name}`' for name in names) if names else 'none'} is. Nothing was changed."
        )
    return names[0]


def training_adapters(state: AdapterState) -> Iterator[str]:
    """The AdaLoRA adapters that are active and trainable."""
    return (n for n in state.active if state.wants_grad(n) and isinstance(state.configs[n], AdaLoraConfig))


# ---- what happens in the model's forward
def orthogonal_regularisation(model: nn.Module) -> Tensor | None:
    """`orth_reg_weight` times the mean of ||A A^T - 1|| and ||B^T B - 1|| over all layers; None if no AdaLoRA trains.

    It is part of `outputs.loss` of models that compute one, while gradients are recorded; add it to a loss of your own.

    Raises: NoAdapterError.
    """
    state = state_of(model)
    terms = [penalty(model, state, name) for name in training_adapters(state)]
    return torch.stack(terms).sum() if terms else None


def penalty(model: nn.Module, state: AdapterState, name: str) -> Tensor:
    """What one adapter adds to the loss."""
    config: Any = state.configs[name]
    factors = [(layer.lora_A[name], layer.lora_B[name]) for _, layer in adapted(model, name)]
    norms = [distance_from_one(gram) for A, B in factors for gram in (A @ A.T, B.T @ B)]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).mean() * float(config.orth_reg_weight)


def adapted(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterLayer]]:
    """The layers that have this adapter, whole modules aside, by path."""
    return ((path, it) for path, it in named_layers(model) if name in it.variants and it.variants[name].mergeable)


def distance_from_one(gram: Tensor) -> Tensor:
    """||gram - 1||, by the squares of all entries."""
    return (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).square().sum().sqrt()


def after_forward(model: nn.Module, state: AdapterState, name: str, output: Any) -> Any:
    """Add the regularisation to the loss in a model's output, if there is one."""
    config: Any = state.configs[name]
    loss = getattr(output, "loss", None)
    if not state.wants_grad(name):
        return output
    if not torch.compiler.is_compiling():
        notice_steps(model, state, name)
    if isinstance(loss, Tensor) and config.orth_reg_weight:
        output.loss = loss + penalty(model, state, name).to(loss)
    return output


def notice_steps(model: nn.Module, state: AdapterState, name: str) -> None:
    """Warn, once, when optimizer steps change E past `tinit` and nobody calls `update_and_allocate`."""
    memory: Allocation = state.memory.setdefault(name, Allocation())
    if not memory.is_watched:
        return
    config: Any = state.configs[name]
    E: Tensor = next(adapted(model, name))[1].lora_E[name].detach()
    if memory.watch is None or memory.watch.seen.device != E.device or memory.watch.seen.shape != E.shape:
        memory.watch = Watch(E.clone(), torch.zeros((), dtype=torch.long, device=E.device))
    most = max(config.tinit, 1)
    if memory.watch.steps(E, most) <= most:
        return
    memory.is_watched = False
    warn(
        f"AdaLoRA adapter `{name}` trains without allocating ranks: `tinit` is `{config.tinit}` and "
        "`update_and_allocate` was not called yet. Call `peftlite.update_and_allocate(model, step)` after every "
        "`optimizer.step()`, or give transformers' Trainer an `AdaLoraCallback`."
    )
