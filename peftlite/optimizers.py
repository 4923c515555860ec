"""Optimizers that know LoRA's two factors apart: LoRA+ and LoRA-FA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlite.checks import check_number, show, wrong
from peftlite.core.hosts import EmbeddingHost, Host
from peftlite.core.layer import AdapterLayer
from peftlite.core.lifecycle import state_of
from peftlite.core.tree import is_bias, layers
from peftlite.errors import ConfigError, StateError
from peftlite.tuners.lora.lowrank import LowRank
from peftlite.tuners.lora.stacks import LAYER, stack_of, stored
from peftlite.tuners.lora.variant import LORA

_RIDGE = 1e-8  # added to the diagonal of A A^T, so that it has an inverse


# ---- LoRA+
def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float | None = None,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """LoRA+ (https://arxiv.org/abs/2402.12354): B learns `loraplus_lr_ratio` times as fast as A.

    There are four groups of parameters: matrices other than B, with `lr`; factors of embeddings, with
    `loraplus_lr_embedding`; B and other vectors, with `lr * loraplus_lr_ratio`; and, with the same rate and without
    weight decay, biases and the vectors of norms.

    Args:
        model: a model with adapters; what requires gradients is optimized.
        optimizer_cls: such as `torch.optim.AdamW`.
        lr: the learning rate.
        loraplus_lr_ratio: 16 is what the paper suggests to try first.
        loraplus_weight_decay: of the first three groups; by default the optimizer's own `weight_decay`, if it is given.
        loraplus_lr_embedding: the learning rate of embeddings' factors.
        kwargs: go to the optimizer.

    Raises: ConfigError for numbers that cannot be used, NoAdapterError.
    """
    state_of(model)
    ratio = check_number("loraplus_lr_ratio", loraplus_lr_ratio)
    if ratio <= 0:
        raise wrong("loraplus_lr_ratio", loraplus_lr_ratio, "a number above 0")
    decay = kwargs.get("weight_decay", 0.0) if loraplus_weight_decay is None else loraplus_weight_decay
    groups = sorted_parameters(model)
    rates = (lr, loraplus_lr_embedding, lr * ratio, lr * ratio)
    decays = (decay, decay, decay, 0.0)
    make: Callable[..., Optimizer] = optimizer_cls
    optimizer = make(
        [
            {"params": params, "weight_decay": weight_decay, "lr": rate}
            for params, weight_decay, rate in zip(groups, decays, rates, strict=True)
        ],
        lr=lr,
        **kwargs,
    )
    if optimizer_cls.__module__.partition(".")[0] == "bitsandbytes":
        keep_embeddings_precise(model)
    return optimizer


def sorted_parameters(model: nn.Module) -> tuple[list[nn.Parameter], ...]:
    """What trains, in LoRA+'s four groups: matrices, embeddings' factors, B and vectors, vectors without decay."""
    ours = {id(parameter): (slot, kind) for slot, kind, parameter in factors(model)}
    groups: tuple[list[nn.Parameter], ...] = ([], [], [], [])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        slot, host = ours.get(id(parameter), (None, None))
        vector = parameter.dim() == 1
        if isinstance(host, EmbeddingHost):
            at = 1
        elif slot == "lora_B" or vector:
            at = 3 if vector and (slot is None or is_bias(name.rpartition(".")[2])) else 2
        else:
            at = 0
        groups[at].append(parameter)
    return groups


def factors(model: nn.Module) -> Iterator[tuple[str, Host, nn.Parameter]]:
    """(slot, host of the layer, parameter) of everything on LoRA layers."""
    for layer in layers(model):
        if layer.tuner is not LORA:
            continue
        for slot in layer.tuner.slots:
            for parameter in layer.container(slot.name).parameters():
                yield slot.name, layer.host, parameter


def keep_embeddings_precise(model: nn.Module) -> None:
    """Have bitsandbytes' optimizers keep 32 bits of state for embeddings, which 8 do not suffice for."""
    manager: Any = import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


# ---- LoRA-FA
def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """LoRA-FA (https://arxiv.org/abs/2308.03303): A stays as it is, and B's gradient is corrected for that; AdamW.

    The active adapters' A is frozen from now on, so that nothing need be kept of the layers' inputs but x A^T. Factors
    of embeddings, whose A begins at zero, train as usual, and so does all else that requires gradients.

    Args:
        model: a model with LoRA adapters.
        r: ranks are read off the layers, so this changes nothing.
        lora_alpha: scalings are read off the layers, so this changes nothing.
        lr: the learning rate.
        weight_decay: AdamW's.
        use_rslora: if given, it must be what the adapters' configs say.

    Raises: ConfigError, NoAdapterError, StateError if nothing trains.
    """
    state = state_of(model)
    for name in state.active:
        says = getattr(state.configs[name], "use_rslora", None)
        if use_rslora is not None and says is not use_rslora:
            raise ConfigError(
                f"`use_rslora` is {show(use_rslora)}, and {show(says)} in the config of adapter `{name}`, which "
                "counts: leave it out. Nothing was changed."
            )
    pairs = {id(pair.B): pair for pair in frozen_pairs(model)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise StateError("Nothing requires gradients: call `set_requires_grad` first. Nothing was changed.")
    return LoraFAOptimizer(trained, [pairs.get(id(p)) for p in trained], lr=lr, weight_decay=weight_decay)


@dataclass
class Pair:
    """The two factors of one adapter on one layer, A frozen, and what corrects B's gradient G.

    The full weight's gradient is best followed by G (A A^T)^-1 / scaling^2.
    """

    host: Host
    A: Tensor
    B: nn.Parameter
    scaling: float
    known: tuple[int, int] | None = None
    inverse: Tensor | None = None

    def corrected(self, grad: Tensor) -> Tensor:
        """The gradient for B, in at least fp32."""
        product = stack_of(self.host, self.A.detach(), grad.to(torch.promote_types(grad.dtype, torch.float32)))
        now = (self.A.data_ptr(), self.A._version)
        if self.inverse is None or self.known != now:
            A = product.A.to(torch.float32 if product.A.device.type == "mps" else torch.float64)
            gram = A @ A.mT  # (n, r, r)
            ridge = _RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
            self.known, self.inverse = now, (torch.linalg.inv(gram + ridge) / self.scaling**2).to(product.B.dtype)
        return stored(self.host, LowRank(product.A, product.B @ self.inverse))[LAYER[1]]


def frozen_pairs(model: nn.Module) -> Iterator[Pair]:
    """The pairs of the active adapters that train, with A frozen for as long as they exist."""
    for layer in layers(model):
        for name in layer.active_adapters if layer.tuner is LORA else ():
            if name in layer.variants and not isinstance(layer.host, EmbeddingHost):
                A, B = (layer.tensors(name)[suffix] for suffix in LAYER)
                if isinstance(B, nn.Parameter) and B.requires_grad:
                    freeze_A(layer, name, A)
                    yield Pair(layer.host, A, B, float(layer.scaling[name]))


def freeze_A(layer: AdapterLayer, name: str, A: Tensor) -> None:  # noqa: N802 - the factor's name
    """Keep one adapter's A out of training."""
    variant = copy.copy(layer.variants[name])
    variant.frozen = variant.frozen | {"lora_A"}
    layer.variants[name] = variant
    layer.unbind()
    A.requires_grad_(False)
    A.grad = None


class LoraFAOptimizer(Optimizer):
    """AdamW; the gradients of parameters that have a `Pair` are corrected first."""

    def __init__(
        self,
        params: list[nn.Parameter],
        pairs: list[Pair | None],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(
                f"`lr`, `eps` and `weight_decay` cannot be negative, and `betas` must be in [0, 1): {lr}, {eps}, "
                f"{weight_decay}, {betas}. Nothing was changed."
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.pairs = pairs

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` computes the loss again."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        at = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                pair = self.pairs[at] if at < len(self.pairs) else None
                at += 1
                if parameter.grad is not None:
                    grad = parameter.grad if pair is None else pair.corrected(parameter.grad)
                    self.update(parameter, grad, group)
        return loss

    def update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """AdamW's update of one parameter."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] += 1
        (beta1, beta2), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.add_((mean / square.sqrt().add_(group["eps"])).to(parameter.dtype), alpha=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
