"""LoRA-GA (https://arxiv.org/abs/2407.05000): factors along the singular vectors of the first gradient of W."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftlite.errors import StateError
from peftlite.tuners.lora.inits.watch import (
    by_path,
    check_called,
    linear_targets,
    read_cache,
    rows,
    watched,
    without_gradients,
    write_cache,
)
from peftlite.tuners.lora.options import LoraGAConfig


@dataclass(frozen=True)
class Gradient:
    """The 2 r largest components of a gradient G = U S V^T: U (out, 2 r), S (2 r,), V (2 r, in)."""

    U: Tensor
    S: Tensor
    V: Tensor

    def factors(self, W: Tensor, r: int, scaling: float, config: LoraGAConfig) -> tuple[Tensor, Tensor]:
        """A from some of the components' V, B from some of their U S, scaled as the config says."""
        r = min(r, len(self.S) // 2)
        columns, into = chosen(config.direction, r)
        A, B = self.V[into], self.U[:, columns] * self.S[columns]
        if config.scale == "gd_scale":
            return A / scaling, B / scaling
        if config.scale == "stable":
            return A, B * W.shape[0] ** 0.25 / config.stable_gamma**0.5
        if config.scale == "weight_svd":
            return A, B * torch.linalg.matrix_norm(W, 2) / self.S[columns].max()
        return A, B


def chosen(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which of 2 r components B is made of, and which A."""
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    if direction == "ArBr":
        return torch.arange(0, 2 * r, 2), torch.arange(1, 2 * r, 2)
    if direction == "A2rBr":
        return first, second
    if direction == "ArB2r":
        return second, first
    both = torch.randperm(2 * r)[:r]
    return both, both


_GRADIENTS: WeakKeyDictionary[nn.Module, Gradient] = WeakKeyDictionary()


def recall(layer: nn.Module, path: str, r: int) -> Gradient:
    """What `preprocess_loraga` found for a layer.

    Raises: StateError if it was not called, or for a smaller rank.
    """
    found = _GRADIENTS.get(layer)
    if found is None or len(found.S) < min(2 * r, found.U.shape[0], found.V.shape[1]):
        raise StateError(
            f"`init_lora_weights='lora_ga'` needs the gradient of `{path}`: call `preprocess_loraga` on this model "
            "with this config first. (A file that says so was saved relative to weights that it does not have.) "
            "Nothing was changed."
        )
    return found


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Prepare `model` for an adapter with `init_lora_weights="lora_ga"`; call it before adding that.

    The gradients are computed from each layer's inputs and output gradients, so that quantised layers have them too,
    and no parameter gets one: flags and gradients of the model are afterwards what they were.

    Args:
        model: the bare model. Nothing is written to it.
        lora_config: the adapter's config.
        train_step: runs the model forward and backward; if more often than once, the mean of the gradients counts.
        cache_file: where to keep what is found; if it exists, `train_step` is not called.

    Raises: ConfigError, StateError if no gradient reaches a target layer.
    """
    hosts = linear_targets(model, lora_config, "lora_ga")
    cached = read_cache(cache_file)
    if cached is None:
        sums: dict[str, tuple[Tensor, int]] = {}
        with without_gradients(model), watched(watchers(model, list(hosts), sums)):
            train_step()
        check_called(sums, list(hosts), "The gradient")
        found = {path: decomposed(*sums.pop(path), 2 * lora_config.rank_for(path)) for path in hosts}
        write_cache(cache_file, {f"{path}.{n}": getattr(g, n) for path, g in found.items() for n in ("U", "S", "V")})
    else:
        check_called({key.rpartition(".")[0]: None for key in cached}, list(hosts), f"`{cache_file}`")
        found = {path: Gradient(*(cached[f"{path}.{n}"] for n in ("U", "S", "V"))) for path in hosts}
    for path, host in hosts.items():
        g = found[path]
        _GRADIENTS[host.layer] = Gradient(*(tensor.to(host.device) for tensor in (g.U, g.S, g.V)))


def watchers(model: nn.Module, paths: list[str], sums: dict[str, tuple[Tensor, int]]) -> dict[nn.Module, Any]:
    """For each layer, what adds up the gradients of its weight (out, in), and counts them."""

    def watch(path: str) -> Callable[[Tensor, Tensor], None]:
        def add(x: Tensor, y: Tensor) -> None:
            if not y.requires_grad:
                y.requires_grad_()  # the first layer: no parameter before it asks for gradients
            y.register_hook(lambda gradient: note(rows(gradient).T @ rows(x)))  # type: ignore[no-untyped-call]

        def note(gradient: Tensor) -> None:
            before, count = sums.get(path, (0.0, 0))
            sums[path] = before + gradient, count + 1

        return add

    return {module: watch(path) for path, module in by_path(model, paths).items()}


def decomposed(total: Tensor, count: int, components: int) -> Gradient:
    """The largest components of the mean of some gradients."""
    U, S, Vh = torch.linalg.svd(total / count, full_matrices=False)
    return Gradient(U[:, :components].contiguous(), S[:components].contiguous(), Vh[:components].contiguous())
