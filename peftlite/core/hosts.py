"""Hosts: all we know about one kind of base layer.

Weights are handed out in one canonical layout, `[*batch, out, in, *kernel]`. A host answers from the *module* whatever
can be answered so (shape, device, dtype): packed, meta, offloaded and sharded weights all lie about their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlite.core.room import cloned

ALL_ROWS = slice(None)


class Dense(NamedTuple):
    """A base layer's weight `[*batch, out, in, *kernel]` and bias `(out,)`; of the rows (dimension `out`) asked for."""

    weight: Tensor
    bias: Tensor | None


class Saved(NamedTuple):
    """A base layer's own bytes.

    `shared`: `weight` and `bias` are the Parameters, which other modules use too, to be put back as they are.
    """

    weight: Any
    bias: Tensor | None
    shared: bool = False

    def on_cpu(self) -> Saved:
        """The same in CPU memory."""
        return self._replace(weight=on_cpu(self.weight), bias=on_cpu(self.bias))


def mark_borrowed(parameter: nn.Parameter) -> None:
    """Note that `parameter` lies on another model's storage, so that nothing may be written into it."""
    parameter._peftlite_borrowed = True  # type: ignore[attr-defined]


def is_borrowed(parameter: Tensor) -> bool:
    """Whether `parameter` lies on another model's storage. Copies do not, and so have no such mark."""
    return getattr(parameter, "_peftlite_borrowed", False)


def on_cpu(held: Any) -> Any:
    """A tensor in CPU memory, still a Parameter if it is one; anything else as it is."""
    if not isinstance(held, Tensor) or held.device.type == "cpu":
        return held
    return nn.Parameter(held.detach().cpu(), held.requires_grad) if isinstance(held, nn.Parameter) else held.cpu()


def copied(parameter: Tensor) -> nn.Parameter:
    """A Parameter with storage of its own."""
    return nn.Parameter(cloned(parameter), parameter.requires_grad)


def widened(tensor: Tensor) -> Tensor:
    """In the precision that sums are made in: fp32 for what is stored in less."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


class Host:
    """One base layer whose parameters are dense tensors; the base class of all hosts."""

    label: ClassVar[str] = "Linear"
    """What this kind of layer is called."""
    weight_only: ClassVar[bool] = False
    """The module reads its weight itself, so that adapters must edit the weight and not the call."""
    transposed: ClassVar[bool] = False
    """A linear layer that stores its weight (in, out)."""
    packed: ClassVar[bool] = False
    """The weight is quantised: it is written whole, and then is what was written but for rounding."""
    batch: int = 0
    """How many leading dimensions of the canonical weight are experts."""

    bias_param: ClassVar[str] = "bias"
    """What the layer calls its bias."""
    inner: ClassVar[tuple[str, ...]] = ()
    """Children whose weight the module reads without calling them; they are adapted along with it."""

    def __init__(self, layer: nn.Module, param: str = "weight") -> None:
        self.layer = layer
        self.param = param

    # ---- known without touching bytes
    @property
    def name(self) -> str:
        """The printed name's second half: `lora.Linear`."""
        return self.label

    @property
    def parameter(self) -> Any:
        """The parameter that adapters are about."""
        held = self.layer._parameters.get(self.param)  # without the detour that torch takes for an attribute
        return getattr(self.layer, self.param) if held is None else held

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's bias parameter, where it has one."""
        return getattr(self.layer, self.bias_param, None)

    @property
    def written(self) -> tuple[str, ...]:
        """What the layer calls the parameters that merging writes."""
        return (self.param,) if self.bias is None else (self.param, self.bias_param)

    @property
    def shape(self) -> tuple[int, ...]:
        """Canonical shape `[*batch, out, in, *kernel]`."""
        return tuple(self.canonical(self.parameter).shape)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        hook = self.layer.__dict__.get("_hf_hook")
        place = None if hook is None else getattr(hook, "execution_device", None)
        return torch.device(place) if place is not None else self.parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return self.parameter.dtype  # type: ignore[no-any-return]

    def canonical(self, raw: Tensor) -> Tensor:
        """Stored layout -> canonical layout, as a view. Its own inverse."""
        return raw

    # ---- bytes
    def read(self, saved: Saved | None = None, rows: slice = ALL_ROWS) -> Dense:
        """The weight and bias in canonical layout (views where possible), as they are or as they were `saved`."""
        weight, bias = (self.parameter, self.bias) if saved is None else (saved.weight, saved.bias)
        device = self.parameter.device
        return Dense(
            self.take(self.canonical(weight.detach()), rows).to(device),
            None if bias is None else self.take_bias(bias.detach(), rows).to(device),
        )

    @torch.no_grad()
    def write(self, new: Dense, rows: slice = ALL_ROWS) -> None:
        """Put canonical values into the layer's parameters, in place: whoever shares the storage sees them."""
        self.take(self.canonical(self.parameter.data), rows).copy_(new.weight)
        if new.bias is not None and self.bias is not None:
            self.take_bias(self.bias.data, rows).copy_(new.bias)

    def take(self, weight: Tensor, rows: slice) -> Tensor:
        """Rows of the dimension `out` of a canonical weight."""
        return weight if rows == ALL_ROWS else weight[(slice(None),) * self.batch + (rows,)]

    def take_bias(self, bias: Tensor, rows: slice) -> Tensor:
        """The bias of those rows."""
        return bias if rows == ALL_ROWS else bias[rows]

    def save(self, shared: bool = False) -> Saved:
        """The layer's own bytes; with `shared`, its Parameters themselves, in whose place copies are to be put."""
        weight, bias = self.parameter, self.bias
        if shared:
            return Saved(weight, bias, shared=True)
        return Saved(cloned(weight), None if bias is None else cloned(bias))

    def put_copies(self, saved: Saved) -> None:
        """Give the layer Parameters of its own, equal to those saved."""
        weight, bias = copied(saved.weight), None if saved.bias is None else copied(saved.bias)
        setattr(self.layer, self.param, weight)
        if bias is not None:
            setattr(self.layer, self.bias_param, bias)

    def parked(self, saved: Saved, device: torch.device) -> Saved:
        """The same bytes on another device. Parameters that others use too stay where they are."""
        if saved.shared:
            return saved
        return Saved(saved.weight.to(device), None if saved.bias is None else saved.bias.to(device))

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """The inverse of `save`, bit for bit."""
        if saved.shared:
            setattr(self.layer, self.param, saved.weight)
            if saved.bias is not None:
                setattr(self.layer, self.bias_param, saved.bias)
            return
        self.parameter.data.copy_(saved.weight)
        if saved.bias is not None and self.bias is not None:
            self.bias.data.copy_(saved.bias)

    # ---- use
    def attribute(self, name: str, live: bool) -> Any:
        """What an adapter layer shows as its base layer's attribute; `live`: while adapters are in use."""
        return getattr(self.layer, name)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's map with another canonical weight, without bias."""
        raise NotImplementedError(type(self).__name__)


class LinearHost(Host):
    """`nn.Linear` and its subclasses: weight (out, in)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.layer.out_features), int(self.layer.in_features))  # type: ignore[arg-type]

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class EmbeddingHost(Host):
    """`nn.Embedding`: stored (num, dim), canonical (dim, num); applied to ids."""

    label = "Embedding"

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.layer.embedding_dim), int(self.layer.num_embeddings))  # type: ignore[arg-type]

    @property
    def bias(self) -> None:
        return None

    def canonical(self, raw: Tensor) -> Tensor:
        return raw.T

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        table: Any = self.layer
        found = F.embedding(
            x, weight.T, table.padding_idx, table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse
        )
        return self.scaled(found)

    def scaled(self, found: Tensor) -> Tensor:
        """Rows of the table as the layer hands them out: some multiply them (Gemma 3)."""
        scale: Any = getattr(self.layer, "embed_scale", None)
        return found if scale is None else found * (scale.to(found.dtype) if isinstance(scale, Tensor) else scale)


class ConvHost(Host):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: weight (out, in / groups, *kernel)."""

    label = "Conv"

    @property
    def name(self) -> str:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        return next(kind.__name__ for kind in kinds if isinstance(self.layer, kind))

    @property
    def shape(self) -> tuple[int, ...]:
        conv: Any = self.layer
        return (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size)

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        conv: Any = self.layer
        y: Tensor = conv._conv_forward(x, weight, None)  # pads as the layer does, whatever its padding mode
        return y


class ParamHost(Host):
    """One parameter that its module reads by itself: a matrix, or fused experts (experts, out, in)."""

    label = "ParamWrapper"
    weight_only = True

    @property
    def bias(self) -> nn.Parameter | None:
        return None

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.parameter.dim() - 2  # type: ignore[no-any-return]

    def canonical(self, raw: Tensor) -> Tensor:
        return raw.transpose(-1, -2) if raw.dim() == 3 and getattr(self.layer, "is_transposed", False) else raw

    def edits(self, dense: Dense) -> dict[str, Tensor]:
        """The module's tensors by name, as they are with this canonical weight and bias."""
        return {self.param: self.canonical(dense.weight).to(self.parameter.dtype)}


class AttentionHost(ParamHost):
    """`nn.MultiheadAttention`: in_proj_weight (3 dim, dim) for q, k and v at once, and `out_proj` along with it."""

    label = "MultiheadAttention"
    bias_param = "in_proj_bias"
    inner = ("out_proj",)

    def __init__(self, layer: nn.Module, param: str = "in_proj_weight") -> None:
        super().__init__(layer, "in_proj_weight")

    @property
    def bias(self) -> nn.Parameter | None:
        bias: nn.Parameter | None = self.layer._parameters["in_proj_bias"]
        return bias

    def edits(self, dense: Dense) -> dict[str, Tensor]:
        bias = {} if dense.bias is None or self.bias is None else {"in_proj_bias": dense.bias.to(self.bias.dtype)}
        return super().edits(dense) | bias

    def attribute(self, name: str, live: bool) -> Any:
        # False keeps nn.TransformerEncoderLayer off its fused path, which reads the weights itself and sees no adapter
        return False if name == "_qkv_same_embed_dim" and live else super().attribute(name, live)


class ModuleHost(Host):
    """Any module at all, for methods that replace the whole module rather than adapt its weight."""

    label = "Module"

    @property
    def parameter(self) -> Any:
        return next(self.layer.parameters(), torch.empty(0))

    @property
    def shape(self) -> tuple[int, ...]:
        return ()


H = TypeVar("H", bound=type[Host])
_BY_TYPE: dict[type[nn.Module], type[Host]] = {
    nn.Linear: LinearHost,
    nn.Embedding: EmbeddingHost,
    nn.Conv1d: ConvHost,
    nn.Conv2d: ConvHost,
    nn.Conv3d: ConvHost,
    nn.MultiheadAttention: AttentionHost,
}
_BY_PREDICATE: list[tuple[Callable[[nn.Module], bool], type[Host]]] = []


def register_host(kind: type[nn.Module]) -> Callable[[H], H]:
    """Class decorator: base layers of type `kind` (and subclasses) are served by the decorated host."""

    def add(host: H) -> H:
        _BY_TYPE[kind] = host
        return host

    return add


def register_host_for(predicate: Callable[[nn.Module], bool]) -> Callable[[H], H]:
    """Class decorator for kinds that share a class with another, such as an `nn.Linear` whose weight is quantised."""

    def add(host: H) -> H:
        _BY_PREDICATE.append((predicate, host))
        return host

    return add


def host_for(layer: nn.Module) -> Host | None:
    """The host of a base layer, or None for a kind that no host knows."""
    for predicate, kind in _BY_PREDICATE:
        if predicate(layer):
            return kind(layer)
    known = _BY_TYPE.get(type(layer))  # the usual case
    if known is not None:
        return known(layer)
    return next((_BY_TYPE[t](layer) for t in type(layer).__mro__ if t in _BY_TYPE), None)


def swapped(module: nn.Module, edits: Mapping[str, Any]) -> nn.Module:
    """A shallow twin of `module` with some parameters or children replaced; `module` itself is never touched.

    So threads, exceptions, parametrisations and hooks cannot see a half-edited layer.
    """
    twin = object.__new__(type(module))
    own = dict(module.__dict__)
    own["_parameters"], own["_modules"] = dict(module._parameters), dict(module._modules)
    own.pop("forward", None)  # patched onto the instance, so bound to the original
    for name, value in edits.items():
        own["_modules" if isinstance(value, nn.Module) else "_parameters"][name] = value
    twin.__dict__.update(own)
    return twin


def call_swapped(module: nn.Module, edits: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """The module called with some parameters or children replaced, for this call only."""
    twin = swapped(module, edits)
    if torch.compiler.is_compiling() and not (twin._forward_pre_hooks or twin._forward_hooks):
        return type(module).forward(twin, *args, **kwargs)  # dynamo finds no closures of what it made itself
    return twin(*args, **kwargs)


def known_kinds() -> list[str]:
    """The names of the kinds of layer that have a host, for error messages."""
    return sorted(kind.__name__ for kind in _BY_TYPE)
