"""Training one LoRA layer in every way that torch has: the gradients are those of the formula, written out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlite
from peftlite.tuners.lora import blocks, bound
from peftlite.tuners.lora.masks import drawn, dropped, kept, kept_of, new_seed, opened, put_

IN, OUT = 12, 10
Found = dict[str, Tensor]


class Formula(nn.Module):
    """What `layer` computes, by plain operations, with parameters of its own that have the same names."""

    def __init__(self, layer: Any, small: bool = False) -> None:
        super().__init__()
        self.layer, self.small = copy.deepcopy(layer), small
        self.p: float = getattr(layer.lora_dropout["default"], "p", 0.0)
        self.runtime: peftlite.LoraRuntimeConfig = layer.state.configs["default"].runtime_config

    def forward(self, x: Tensor) -> Tensor:
        base, A, B = (self.layer.base_layer, *(f["default"].weight for f in (self.layer.lora_A, self.layer.lora_B)))
        y = F.linear(x, base.weight, base.bias)
        if self.runtime.compute_dtype == "base":
            A, B = A.to(base.weight.dtype), B.to(base.weight.dtype)
        low = x.to(A.dtype)
        if self.p and self.small:
            low = F.dropout(low, self.p)
        elif self.p:
            seed = new_seed() if self.runtime.dropout_mask == "seed" else None
            keep = ones_of(x, drawn(x.reshape(-1, x.shape[-1]), self.p, seed))
            low = torch.where(keep == 1, low, 0.0) / (1 - self.p)
        return (y + F.linear(F.linear(low, A), B) * self.layer.scaling["default"]).to(y.dtype)


def ones_of(x: Tensor, bits: Tensor) -> Tensor:
    """0 or 1 for each element of x."""
    return opened(bits, torch.empty(x.shape, dtype=torch.int16))


def adapted(dtype: torch.dtype, dropout: float, bias: str = "none", **runtime: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
    fields: dict[str, Any] = {"r": 3, "target_modules": ["0"], "lora_dropout": dropout, "bias": bias}
    config = peftlite.LoraConfig(runtime_config=peftlite.LoraRuntimeConfig(**runtime), **fields)  # type: ignore[arg-type]
    peftlite.inject(model, config)
    nn.init.normal_(model[0].lora_B["default"].weight)
    return model[0]


def loss_of(y: Tensor) -> Tensor:
    return y.float().pow(3).mean()


def found_in(layer: nn.Module, **more: Tensor | None) -> Found:
    named = {name.removeprefix("layer."): p.grad for name, p in layer.named_parameters()}
    return {name: grad for name, grad in {**named, **more}.items() if grad is not None}


def plain(layer: nn.Module, x: Tensor) -> Found:
    y = layer(x)
    loss_of(y).backward()
    return found_in(layer, x=x.grad, y=y.detach())


def frozen_input(layer: nn.Module, x: Tensor) -> Found:
    return plain(layer, x.detach())


def transposed(layer: nn.Module, x: Tensor) -> Found:
    y = layer(x.transpose(0, 1))
    loss_of(y * torch.arange(y.numel()).view(y.shape[::-1]).permute(2, 1, 0).to(y.dtype) / y.numel()).backward()
    return found_in(layer, x=x.grad, y=y.detach())


def flat(layer: nn.Module, x: Tensor) -> Found:
    y = layer(x[0])
    loss_of(y).backward()
    return found_in(layer, x=x.grad, y=y.detach())


def single(layer: nn.Module, x: Tensor) -> Found:
    y = layer(x[0, 0])
    loss_of(y).backward()
    return found_in(layer, x=x.grad, y=y.detach())


def empty(layer: nn.Module, x: Tensor) -> Found:
    y = layer(x[:0])
    y.sum().backward()
    return found_in(layer, x=x.grad, y=y.detach())


def autocast(layer: nn.Module, x: Tensor) -> Found:
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    loss_of(y).backward()
    return found_in(layer, x=x.grad, y=y.detach())


def reentrant(layer: nn.Module, x: Tensor) -> Found:
    return plain(lambda_of(layer, use_reentrant=True), x) | found_in(layer)


def not_reentrant(layer: nn.Module, x: Tensor) -> Found:
    return plain(lambda_of(layer, use_reentrant=False), x) | found_in(layer)


def lambda_of(layer: nn.Module, use_reentrant: bool) -> nn.Module:
    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return checkpoint(layer, x, use_reentrant=use_reentrant)

    return Checkpointed()


def twice(layer: nn.Module, x: Tensor) -> Found:
    (g,) = torch.autograd.grad(loss_of(layer(x)), x, create_graph=True)
    loss_of(g * 10).backward()
    return found_in(layer, x=x.grad, g=g.detach())


def functional(layer: nn.Module, x: Tensor) -> Found:
    values = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(values: Found, x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(layer, values, (x,)))

    grads, gx = torch.func.grad(loss, argnums=(0, 1))(values, x.detach())
    return {**{name.removeprefix("layer."): grad for name, grad in grads.items()}, "x": gx}


def per_sample(layer: nn.Module, x: Tensor) -> Found:
    values = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}

    def loss(values: Found, x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(layer, values, (x,)))

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x.detach())
    return {name.removeprefix("layer."): grad for name, grad in found.items()}


def hooked(layer: nn.Module, x: Tensor) -> Found:
    inner: Any = layer.layer if isinstance(layer, Formula) else layer
    seen: list[Tensor] = []
    if inner is layer:
        inner.lora_A["default"].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    found = plain(layer, x)
    assert inner is not layer or len(seen) == 1
    return found


def compiled(layer: nn.Module, x: Tensor) -> Found:
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    loss_of(y).backward()
    return found_in(layer, x=x.grad, y=y.detach())


def one_factor(layer: nn.Module, x: Tensor) -> Found:
    for name, p in layer.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    return plain(layer, x)


FUSED = (plain, frozen_input, transposed, flat, single, empty, reentrant, not_reentrant, twice, one_factor)
OTHERS = (autocast, functional, per_sample, hooked, compiled)
CASES = [(way, dropout) for way in FUSED for dropout in (0.0, 0.4)] + [(way, 0.0) for way in OTHERS]
NAMES = [f"{way.__name__}{'-dropout' if dropout else ''}" for way, dropout in CASES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("way", "dropout"), CASES, ids=NAMES)
@pytest.mark.parametrize(
    ("bias", "small", "runtime"),
    [
        ("none", False, {}),
        ("all", False, {}),
        ("all", True, {}),
        ("all", False, {"compute_dtype": "base"}),
        ("none", True, {"compute_dtype": "base"}),
        ("all", False, {"dropout_mask": "seed"}),
        ("none", False, {"compute_dtype": "base", "dropout_mask": "seed"}),
    ],
)
def test_gradients_are_those_of_the_formula(
    way: Callable[[nn.Module, Tensor], Found],
    dropout: float,
    dtype: torch.dtype,
    bias: str,
    small: bool,
    runtime: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not small:
        monkeypatch.setattr(blocks, "SMALL", 0)
    monkeypatch.setattr(blocks, "LARGE", 3 * IN)  # in several blocks, the last of them smaller
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer = adapted(dtype, dropout, bias, **runtime)
    formula = Formula(layer, small)
    applied: list[object] = []
    real = bound.FusedLora.apply
    monkeypatch.setattr(bound.FusedLora, "apply", lambda *args: applied.append(args) or real(*args))
    results = []
    for module in (layer, formula):
        torch.manual_seed(1)
        x = torch.randn(2, 5, IN).to(dtype).requires_grad_()
        torch.manual_seed(2)
        results.append(way(module, x))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    assert bool(applied) == (way in FUSED and not small)
    near = 1e-5
    if dtype is torch.bfloat16 or way is autocast:
        near = 8e-2
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        size = float(theirs[name].abs().max()) if theirs[name].numel() else 0.0
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=max(1e-12, near * size))


@pytest.mark.parametrize(
    ("base", "adapter"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_adapters_may_be_of_another_dtype_than_usual(
    base: torch.dtype, adapter: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "SMALL", 0)
    monkeypatch.setattr(blocks, "LARGE", 3 * IN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer = adapted(base, dropout)
    for parts in (layer.lora_A, layer.lora_B):
        parts.to(adapter)
    results = []
    for module in (layer, Formula(layer)):
        torch.manual_seed(1)
        x = torch.randn(2, 5, IN).to(base).requires_grad_()
        results.append(plain(module, x))
    near = 1e-5 if adapter is torch.float64 else 8e-2
    for name, theirs in results[1].items():
        torch.testing.assert_close(results[0][name], theirs, rtol=0, atol=near * float(theirs.abs().max()))


@torch.no_grad()
def test_inference_in_blocks_is_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = adapted(torch.bfloat16, 0.0).eval(), torch.randn(40, IN).bfloat16()
    whole = layer(x)
    monkeypatch.setattr(blocks, "LARGE", 7 * IN)
    assert [(rows.start, rows.stop) for rows in blocks.blocks(torch.empty(20, 7 * IN * torch.get_num_threads()))] == [
        (row, row + 1) for row in range(20)
    ]
    torch.testing.assert_close(layer(x), whole, rtol=2**-7, atol=1e-3)


def test_wide_copies_of_blocks_use_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGE", 3 * IN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, found, places = torch.randn(7, IN).bfloat16(), [], set()
    for rows, wide in blocks.wide_blocks(x, torch.float32):
        assert torch.equal(wide, x[rows].float())
        found.append((rows.start, len(wide)))
        places.add(wide.data_ptr())
        wide.zero_()
    assert found == [(0, 3), (3, 3), (6, 1)]
    assert len(places) == 1
    assert not list(blocks.wide_blocks(x[:0], torch.float32))


@pytest.mark.parametrize("shape", [(32, 9), (3, 7), (1, 1), (16, 16), (5, 48)])
def test_a_mask_is_one_bit_for_each_element(shape: tuple[int, int]) -> None:
    """Bit k of n numbers, one after the other, stands for elements k n to (k + 1) n; any part of them can be opened."""
    elements = math.prod(shape)
    bits = torch.randint(-(2**15), 2**15, (-(-elements // 16),), dtype=torch.int16)
    expected = torch.tensor([number >> bit & 1 for bit in range(16) for number in bits.tolist()])[:elements]
    assert torch.equal(ones_of(torch.empty(shape), bits).flatten().long(), expected)
    for start in range(elements):
        for stop in {start + 1, (start + elements) // 2, elements} - {start}:
            part = opened(bits, torch.empty(stop - start, dtype=torch.int16), start)
            assert torch.equal(part.long(), expected[start:stop])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.25, 0.3, 0.999999, 1e-9])
def test_masks_keep_as_many_as_they_should(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what one in a million exceeds: in all, in each plane, in each of 64 neighbours."""
    share = max(1, round((1 - p) * 2**16)) / 2**16
    x = torch.empty(1024, 1031)
    torch.manual_seed(3)
    bits = drawn(x, p)
    assert (bits.shape, bits.dtype) == ((-(-x.numel() // 16),), torch.int16)
    ones = ones_of(x, bits).double().flatten()
    for part in (ones, *ones.split(len(bits)), *(ones[at::64] for at in range(64))):
        assert abs(float(part.mean()) - share) < 5 * math.sqrt(share * (1 - share) / len(part)) + 9 / len(part)
    torch.manual_seed(3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    monkeypatch.setattr(blocks, "LARGE", 500)
    assert torch.equal(drawn(x, p), bits)
    assert torch.equal(drawn(x.bfloat16(), p, 11), drawn(x, p, 11))


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_what_is_dropped_says_nothing_of_the_rest(p: float) -> None:
    torch.manual_seed(4)
    x = torch.empty(512, 2048)
    first, second = (ones_of(x, drawn(x, p)).double().flatten().sub_(1 - p) for _ in range(2))
    n, plane = x.numel(), x.numel() // 16
    pairs = [(first, second)]
    pairs += [(first[lag:], first[:-lag]) for lag in (1, 2, 63, 64, 2048, 8192 * 64, plane, 3 * plane, n // 2 + 1)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 5 * p * (1 - p) / math.sqrt(len(one))


def test_another_device_draws_masks_by_its_own_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own operations: here on a CPU, where a subclass asks for them."""

    class Other(Tensor):
        pass

    real, p = torch.empty, 0.3
    monkeypatch.setattr(torch, "empty", lambda *args, **given: real(*args, **given).as_subclass(Other))
    x = real(1024, 1031)
    torch.manual_seed(3)
    bits = drawn(x, p).as_subclass(Tensor)
    monkeypatch.undo()
    assert (bits.shape, bits.dtype) == ((-(-x.numel() // 16),), torch.int16)
    for part in ones_of(x, bits).double().flatten().split(len(bits)):
        assert abs(float(part.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / len(part))
    torch.manual_seed(3)
    assert not torch.equal(drawn(x, p), bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LARGE", 4 * 13)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = torch.randn(9, 13).to(dtype)
    x[::2, ::3], x[1::2, ::3] = float("inf"), float("nan")
    for given in (x, x.T.contiguous().T):
        bits, seen = drawn(given, 0.5), 0
        keep = ones_of(given, bits) == 1
        for rows, ones in kept_of(given, bits):
            part = dropped(given[rows], ones, torch.empty_like(given[rows]))
            expected = torch.where(keep[rows], given[rows], 0.0)
            torch.testing.assert_close(part, expected, rtol=0, atol=0, equal_nan=True)
            new, old = torch.randn(part.shape).to(dtype), given[rows].clone()
            expected = torch.where(keep[rows], new, old)
            put_(old, new, ones)
            torch.testing.assert_close(old, expected, rtol=0, atol=0, equal_nan=True)
            seen += len(part)
        assert seen == 9
    ordinary = torch.randn(9, 13).to(dtype)
    assert torch.equal(kept(ordinary, bits), torch.where(keep, ordinary, 0.0))


def test_dropping_everything_leaves_the_base_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL", 0)
    layer = adapted(torch.float32, 0.5)
    layer.lora_dropout["default"].p = 1.0
    x = torch.randn(6, IN, requires_grad=True)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("dropout", "mask"), [(0.0, "bits"), (0.4, "bits"), (0.0, "seed"), (0.4, "seed")])
def test_what_is_kept_for_backward(dtype: torch.dtype, dropout: float, mask: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128)).to(dtype)
    peftlite.inject(model, peftlite.LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout))
    peftlite.set_runtime_config(model, peftlite.LoraRuntimeConfig(dropout_mask=mask))
    x = torch.randn(1024, 256).to(dtype).requires_grad_()
    own = {p.data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    u, bits = 1024 * 4 * 4, 1024 * 256 // 8
    beside = {"bits": u + bits, "seed": 0}[mask] if dropout else u
    assert sum(sizes.values()) == x.nbytes + beside
    assert y.requires_grad
