"""LoRA's two factors on each kind of layer: one function per question, dispatched on the host."""

from __future__ import annotations

import math
from functools import singledispatch
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from peftlite.core.hosts import (
    ALL_ROWS,
    ConvHost,
    EmbeddingHost,
    Host,
    LinearHost,
    ParamHost,
    call_swapped,
    widened,
)
from peftlite.core.lean import IDENTITIES, Linear
from peftlite.core.slots import View
from peftlite.core.variant import Placement
from peftlite.tuners import draws
from peftlite.tuners.lora.config import LoraConfig
from peftlite.tuners.lora.inits.table import beginning
from peftlite.tuners.lora.structured import Structured


@singledispatch
def cannot_adapt(host: Host, config: LoraConfig, path: str) -> str | None:
    """Why LoRA cannot adapt a kind of layer, or None."""
    return f"LoRA has no form for {host.label}"


@singledispatch
def factors(host: Host, r: int, at: Placement) -> dict[str, Any]:
    """Fresh factors by slot name."""
    raise NotImplementedError(host.label)


@singledispatch
def pair(host: Host, a: View) -> tuple[Tensor, Tensor]:
    """(A, B) as matrices (r, in * kernel) and (out, r), views of the parameters."""
    raise NotImplementedError(host.label)


@singledispatch
def outer(host: Host, a: View, rows: slice) -> Tensor:
    """B A in the canonical layout, without scaling, for some rows of it."""
    return product(host, *pair(host, a), rows)


@singledispatch
def plus_outer(host: Host, a: View, weight: Tensor, rows: slice) -> Tensor:
    """W + s B A for some rows: one pass over the weight in the place of three."""
    scaling: float | Tensor = a.scaling
    A, B = pair(host, a)
    A, B = widened(A), widened(B if rows == ALL_ROWS else B[rows])
    if isinstance(scaling, Tensor) or not (weight.dtype is A.dtype is B.dtype):
        return weight + outer(host, a, rows) * scaling
    return torch.addmm(weight.flatten(1), B, A, alpha=scaling).view(weight.shape)


@singledispatch
def entering(host: Host, a: View, x: Tensor) -> Tensor:
    """What the first factor is given for the layer's input x: in the factors' dtype, after dropout."""
    if a.layer.state.cast_inputs:
        x = x.to(host.dtype if in_base_dtype(a) else a.lora_A.weight.dtype)
    entered: Tensor = a.lora_dropout(x)
    return entered


@singledispatch
def drops(host: Host, a: View) -> bool:
    """Whether `entering` drops something now."""
    return bool(a.lora_dropout.training and type(a.lora_dropout) not in IDENTITIES)


@singledispatch
def low_rank(host: Host, a: View, entered: Tensor) -> Tensor:
    """B A applied to what `entering` gave, without scaling; by calling the modules, so that hooks on them run."""
    if in_base_dtype(a) and a.layer.state.cast_inputs:
        return called(a.lora_B, called(a.lora_A, entered))
    y: Tensor = a.lora_B(a.lora_A(entered))
    return y


@singledispatch
def along_output(host: Host, per_row: Tensor) -> Tensor:
    """A vector of one number per row of the weight (out,), shaped to be multiplied with the layer's output."""
    return per_row


@singledispatch
def bias_of_B(host: Host, a: View) -> Tensor | None:  # noqa: N802 - the factor's name
    """The bias of the second factor, where it has one."""
    return None


@singledispatch
def not_expressible(host: Host) -> str | None:
    """Why B A has no place in this layer's weight, or None."""
    return None


@singledispatch
def entries(host: Host, r: int) -> int:
    """How many numbers the factors hold."""
    return r * (host.shape[0] + host.shape[1])


@cannot_adapt.register
def _(host: LinearHost, config: LoraConfig, path: str) -> str | None:
    begin = beginning(config.init_lora_weights)
    return None if begin is None else begin.refuses(host, config, path)


@factors.register
def _(host: LinearHost, r: int, at: Placement) -> dict[str, Any]:
    out, into = host.shape
    config: LoraConfig = at.config
    A = first_factor((r, into), into, r, at)
    B = uniform((out, r), r, at) if config.init_lora_weights is False else zeros((out, r), at)
    bias = None
    if config.lora_bias:
        bias = uniform((out,), r, at) if config.init_lora_weights is False else zeros((out,), at)
    made = {"lora_A": Linear(A), "lora_B": Linear(B, bias)}
    begin = beginning(config.init_lora_weights)
    return made if begin is None else begin.fill(made, host, at)


@pair.register
def _(host: LinearHost, a: View) -> tuple[Tensor, Tensor]:
    A, B = (f.matrix() if isinstance(f, Structured) else f.weight for f in (a.lora_A, a.lora_B))
    return A, B


@bias_of_B.register
def _(host: LinearHost, a: View) -> Tensor | None:
    bias: Tensor | None = a.lora_B.bias
    return bias


@cannot_adapt.register
def _(host: EmbeddingHost, config: LoraConfig, path: str) -> str | None:
    return "`lora_bias` has no meaning for an embedding" if config.lora_bias else None


@factors.register
def _(host: EmbeddingHost, r: int, at: Placement) -> dict[str, Any]:
    dim, num = host.shape
    random_A = at.config.init_lora_weights is False
    A = torch.empty((r, num), dtype=at.dtype, device=at.device).normal_() if random_A else zeros((r, num), at)
    B = torch.empty((dim, r), dtype=at.dtype, device=at.device).normal_()
    return {"lora_embedding_A": nn.Parameter(A, False), "lora_embedding_B": nn.Parameter(B, False)}


@pair.register
def _(host: EmbeddingHost, a: View) -> tuple[Tensor, Tensor]:
    return a.lora_embedding_A, a.lora_embedding_B


@entering.register
def _(host: EmbeddingHost, a: View, x: Tensor) -> Tensor:
    return x


@drops.register
def _(host: EmbeddingHost, a: View) -> bool:
    return False


@low_rank.register
def _(host: EmbeddingHost, a: View, entered: Tensor) -> Tensor:
    B: Tensor = a.lora_embedding_B
    low = host.apply(entered, a.lora_embedding_A)
    return low.to(host.dtype) @ B.T.to(host.dtype) if in_base_dtype(a) else low @ B.T


@cannot_adapt.register
def _(host: ConvHost, config: LoraConfig, path: str) -> str | None:
    if beginning(config.init_lora_weights) is not None:
        return f"`init_lora_weights={config.init_lora_weights!r}` has no form for convolutions"
    groups, r = groups_of(host), config.rank_for(path)
    if r % groups:
        return f"its {groups} groups do not divide the rank {r}; nearest: {max(groups, r // groups * groups)}"
    return None


@factors.register
def _(host: ConvHost, r: int, at: Placement) -> dict[str, Any]:
    conv: Any = host.layer
    config: LoraConfig = at.config
    like = {"device": at.device, "dtype": at.dtype}
    geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    make: Any = skip_init  # untyped in torch
    A = make(type_of(host), conv.in_channels, r, conv.kernel_size, bias=False, **geometry, **like)
    B = make(type_of(host), r, conv.out_channels, 1, groups=conv.groups, bias=config.lora_bias, **like)
    fan_in = conv.in_channels * math.prod(conv.kernel_size)
    start = config.init_lora_weights
    with torch.no_grad():
        A.weight.copy_(first_factor(tuple(A.weight.shape), fan_in, r, at))
        for part in (B.weight, B.bias):
            if part is not None:
                part.copy_(uniform(tuple(part.shape), r // conv.groups, at)) if start is False else part.zero_()
    return {"lora_A": A, "lora_B": B}


@pair.register
def _(host: ConvHost, a: View) -> tuple[Tensor, Tensor]:
    return a.lora_A.weight.flatten(1), a.lora_B.weight.flatten(1)


@along_output.register
def _(host: ConvHost, per_row: Tensor) -> Tensor:
    return per_row.view(-1, *[1] * (len(host.shape) - 2))


@bias_of_B.register
def _(host: ConvHost, a: View) -> Tensor | None:
    bias: Tensor | None = a.lora_B.bias
    return bias


@entries.register
def _(host: ConvHost, r: int) -> int:
    out, into, *kernel = host.shape
    return r * (into * groups_of(host) * math.prod(kernel)) + out * (r // groups_of(host))


@not_expressible.register
def _(host: ConvHost) -> str | None:
    if groups_of(host) > 1:
        return "every group of its output depends on all inputs, which a convolution in groups cannot express"
    return None


@cannot_adapt.register
def _(host: ParamHost, config: LoraConfig, path: str) -> str | None:
    if host.parameter is None:
        return "its q, k and v have projections of their own, which `target_parameters` can name"
    if host.parameter.dim() not in (2, 3):
        return f"it has {host.parameter.dim()} dimensions, where a matrix or a stack of matrices is needed"
    begin = beginning(config.init_lora_weights)
    if begin is not None and (host.batch or not begin.follows or begin.rewrites):
        kind = "stacks of matrices" if host.batch else "parameters"
        return f"`init_lora_weights={config.init_lora_weights!r}` has no form for {kind}"
    if config.lora_dropout:
        return f"`lora_dropout` is `{config.lora_dropout}`, and its input is not seen by the adapter; it must be 0"
    if config.lora_bias:
        return "`lora_bias` needs a layer that is called"
    return None if begin is None else begin.refuses(host, config, path)


@entries.register
def _(host: ParamHost, r: int) -> int:
    *batch, out, into = host.shape
    return r * math.prod(batch) * (out + into)


@factors.register
def _(host: ParamHost, r: int, at: Placement) -> dict[str, Any]:
    *batch, out, into = host.shape
    wide = r * math.prod(batch)
    A = first_factor((wide, into), into, r, at)
    B = uniform((out, wide), r, at) if at.config.init_lora_weights is False else zeros((out, wide), at)
    made = {"lora_A": Linear(A), "lora_B": Linear(B)}
    begin = beginning(at.config.init_lora_weights)
    return made if begin is None else begin.fill(made, host, at)


@pair.register
def _(host: ParamHost, a: View) -> tuple[Tensor, Tensor]:
    return a.lora_A.weight, a.lora_B.weight  # of a matrix; the factors of a stack are not two matrices


@outer.register
def _(host: ParamHost, a: View, rows: slice) -> Tensor:
    if not host.batch:
        return product(host, *pair(host, a), rows)
    A, B = widened(a.lora_A.weight), widened(a.lora_B.weight)
    experts = host.shape[0]  # expert slowest in A (experts r, in), fastest in B (out, r experts)
    B = B if rows == ALL_ROWS else B[rows]
    return B.view(B.shape[0], -1, experts).permute(2, 0, 1) @ A.view(experts, -1, A.shape[1])


@plus_outer.register
def _(host: ParamHost, a: View, weight: Tensor, rows: slice) -> Tensor:
    added: Tensor = outer(host, a, rows) * a.scaling
    return weight + added


IN_FORWARD: Final = (pair, outer, plus_outer, entering, drops, low_rank, along_output, bias_of_B)


def known_to_forward(host: Host) -> None:
    """Look up once what forward asks about this kind of host: a first look-up while compiling would compile twice."""
    for question in IN_FORWARD:
        question.dispatch(type(host))


def in_base_dtype(a: View) -> bool:
    """Whether the low-rank products are computed in the base layer's dtype."""
    return bool(a.config.runtime_config.compute_dtype == "base")


def called(factor: nn.Module, x: Tensor) -> Tensor:
    """A factor called in the dtype of its input."""
    cast = {name: p.to(x.dtype) for name, p in factor._parameters.items() if p is not None and p.dtype != x.dtype}
    y: Tensor = call_swapped(factor, cast, x) if cast else factor(x)
    return y


def groups_of(host: Host) -> int:
    """The groups of a convolution."""
    conv: Any = host.layer
    return int(conv.groups)


def type_of(host: Host) -> type[nn.Module]:
    """`nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`."""
    kind: type[nn.Module] = getattr(nn, host.name)
    return kind


def product(host: Host, A: Tensor, B: Tensor, rows: slice) -> Tensor:
    """B A for some rows, in at least fp32: (out, r) @ (r, in * kernel) -> (out, in, *kernel)."""
    return (widened(B if rows == ALL_ROWS else B[rows]) @ widened(A)).view(-1, *host.shape[1:])


def uniform(shape: tuple[int, ...], fan_in: int, at: Placement) -> Tensor:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the initialisation of `nn.Linear`."""
    return draws.uniform(shape, 1 / math.sqrt(fan_in), at)


def first_factor(shape: tuple[int, ...], fan_in: int, r: int, at: Placement) -> Tensor:
    """What A begins with: as `uniform`, or N(0, 1/r) for `init_lora_weights="gaussian"`."""
    if at.config.init_lora_weights != "gaussian" or at.device.type == "meta":
        return uniform(shape, fan_in, at)
    return torch.empty(shape, dtype=at.dtype, device=at.device).normal_(std=1 / r)


def zeros(shape: tuple[int, ...], at: Placement) -> Tensor:
    """Zeros where the adapter goes."""
    make = torch.empty if at.device.type == "meta" else torch.zeros  # which would run as Python there
    return make(shape, dtype=at.dtype, device=at.device)
