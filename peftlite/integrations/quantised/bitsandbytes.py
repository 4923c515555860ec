"""bitsandbytes: `Linear4bit` (nf4, fp4, with and without double quantisation) and `Linear8bitLt`."""

from __future__ import annotations

import copy
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from peftlite.core.hosts import Host, LinearHost, register_host, register_host_for
from peftlite.core.packed import PackedHost
from peftlite.errors import MergeError

Packed8 = tuple[Tensor, Tensor]  # CB (out, in) int8, SCB (out,): what the largest entry of a row was


class Linear4bitHost(PackedHost, LinearHost):
    """`Linear4bit`: its weight is a `Params4bit`, two numbers to a byte, with the `quant_state` to expand it by.

    The packed tensor's own shape (n, 1) and dtype say nothing of the layer. The module has `quant_state` a second time.
    """

    label = "Linear4bit"
    takes_any_dtype = True

    @property
    def dtype(self) -> torch.dtype:
        state = self.parameter.quant_state
        found: Any = self.layer.compute_dtype  # None until the first forward, if it was not given
        return found or (self.parameter.dtype if state is None else original_dtype(state))

    def hold(self, packed: Any) -> None:
        layer: Any = self.layer
        layer.weight = packed
        layer.quant_state = packed.quant_state

    def expand(self, packed: Any) -> Tensor:
        if packed.quant_state is None:  # not on its device yet, and so not quantised
            return packed.data  # type: ignore[no-any-return]
        return functional().dequantize_4bit(*in_common_format(packed))  # type: ignore[no-any-return]

    def pack(self, weight: Tensor, like: Any) -> Any:
        if like.quant_state is None:
            raise MergeError("A Linear4bit is quantised when it is moved to its device: do that before merging.")
        _, state = in_common_format(like)
        data, new_state = functional().quantize_4bit(
            weight.to(original_dtype(like.quant_state)),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            compress_statistics=state.nested or (is_repacked(like.quant_state) and like.quant_state.original_nested),
            quant_storage=like.quant_storage,
        )
        return self.parameter_with(data, new_state, like)

    def let_gradients_through(self) -> None:
        layer: Any = self.layer
        layer.support_avx512bf16_for_cpu = False  # its product with repacked weights has no gradients
        weight = layer.weight
        if weight.quant_state is not None and is_repacked(weight.quant_state):
            data, state = in_common_format(weight)
            state.dtype = original_dtype(weight.quant_state)
            self.hold(self.parameter_with(data, state, weight))

    def parameter_with(self, data: Tensor, state: Any, like: Any) -> Any:
        """A weight of these bytes."""
        return parameters("Params4bit")(
            data,
            requires_grad=False,
            quant_state=state,
            blocksize=like.blocksize,
            compress_statistics=like.compress_statistics,
            quant_type=like.quant_type,
            quant_storage=like.quant_storage,
            module=self.layer,
            bnb_quantized=True,
        )


def in_common_format(packed: Any) -> tuple[Tensor, Any]:
    """The bytes of a 4-bit weight in the format of every device, and the state to expand them by, to fp32.

    Where the CPU has bf16 instructions, `Linear4bit.forward` repacks its weight for them at the first inference, and
    keeps the scales of the blocks in bf16, not quantised, and transposed. Nothing of `packed` is changed here.
    """
    state, data = copy.copy(packed.quant_state), packed.data
    if is_repacked(state):
        scales = state.absmax.T.float().reshape(-1)
        state.original_nested = False  # else the inverse would quantise the scales again
        data, state = functional()._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales
    state.dtype = torch.float32
    return data, state


def is_repacked(state: Any) -> bool:
    """Whether a 4-bit weight has the format of CPUs with bf16 instructions."""
    return bool(getattr(state, "packing_format_for_cpu", False))


def original_dtype(state: Any) -> torch.dtype:
    """The dtype that a weight had before it was quantised."""
    return state.original_dtype if is_repacked(state) else state.dtype  # type: ignore[no-any-return]


class Linear8bitHost(PackedHost, LinearHost):
    """`Linear8bitLt`: one scale for each row. Both tensors are attributes of the weight, and of `layer.state` from the
    first forward on.
    """

    label = "Linear8bitLt"
    takes_any_dtype = True

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.bias is None else self.bias.dtype  # the layer computes in its input's

    def home(self) -> Any:
        """What has the tensors now."""
        layer: Any = self.layer
        return layer.state if layer.weight.CB is None else layer.weight

    def held(self) -> Packed8:
        home = self.home()
        return home.CB, home.SCB

    def hold(self, packed: Packed8) -> None:
        layer: Any = self.layer
        in_state = layer.weight.CB is None
        codes, scales = packed
        layer.weight = parameters("Int8Params")(codes, requires_grad=False, has_fp16_weights=False)
        home = layer.state if in_state else layer.weight
        home.CB, home.SCB = codes, scales

    def expand(self, packed: Packed8) -> Tensor:
        codes, scales = packed
        return codes.float() * (scales.float() / 127)[:, None]

    def pack(self, weight: Tensor, like: Packed8) -> Packed8:
        codes, scales, _ = functional().int8_vectorwise_quant(weight.half())
        return codes, scales

    def moved(self, packed: Packed8) -> Packed8:
        codes, scales = packed
        return codes.to(self.device), scales.to(self.device)


class Embedding4bitHost(Host):
    """Quantised embeddings, which no method adapts yet."""

    label = "Embedding4bit"


class Embedding8bitHost(Host):
    """Quantised embeddings, which no method adapts yet."""

    label = "Embedding8bit"


def functional() -> Any:
    """`bitsandbytes.functional`, imported long since by whoever made a layer of bitsandbytes."""
    return import_module("bitsandbytes.functional")


def parameters(name: str) -> Any:
    """A class of parameters, not taken from a layer: pickling makes plain ones with the same attributes of them."""
    return getattr(import_module("bitsandbytes.nn"), name)


def patch(modules: ModuleType) -> None:
    """Make bitsandbytes' layers known."""
    names: Any = modules
    kind: type[nn.Module] = names.Linear8bitLt
    register_host(names.Linear4bit)(Linear4bitHost)
    register_host_for(lambda layer: isinstance(layer, kind) and not is_fp16(layer))(Linear8bitHost)
    register_host(names.Embedding4bit)(Embedding4bitHost)
    register_host(names.Embedding8bit)(Embedding8bitHost)


def is_fp16(layer: Any) -> bool:
    """Whether an 8-bit layer keeps its weight as it was, and quantises it in every forward."""
    return bool(layer.state.has_fp16_weights)
