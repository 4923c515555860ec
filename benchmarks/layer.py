"""What one adapted layer costs: calls without gradients, training steps, bytes kept for backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, pair, same, saved_bytes
from benchmarks.models import STACK, Stack, both


def rows(quick: bool) -> Iterator[Row]:
    for dtype, goal in ((torch.float32, 0.2), (torch.bfloat16, None)):
        for shape in ((4, 64), (1, 4, 64)):
            yield call(dtype, shape, goal, 50 if quick else 1000)
    yield prefill(64 if quick else 1024)
    width = 64 if quick else 1024
    for dtype, goal in ((torch.bfloat16, 0.90), (torch.float32, 0.95)):
        yield step(dtype, width, goal)
    for dtype, dropout, goal in (
        (torch.bfloat16, 0.05, 0.30),
        (torch.bfloat16, 0.0, 0.25),
        (torch.float32, 0.05, 0.35),
    ):
        yield kept_for_backward(dtype, dropout, width, goal)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def call(dtype: torch.dtype, shape: tuple[int, ...], goal: float | None, repeat: int) -> Row:
    base = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    theirs, ours = both(base, target_modules=["0"], r=16)
    x = torch.randn(shape).to(dtype)
    same(theirs(x), ours(x), 1e-2 if dtype is torch.bfloat16 else 1e-5)
    actions = {"base": lambda: base[0](x), "peft": lambda: theirs[0](x), "ours": lambda: ours[0](x)}
    found = {name: spread.median * 1e6 for name, spread in pair(actions, repeat=repeat).items()}
    title = f"one small layer, no gradients, {name_of(dtype)} {list(shape)}"
    if goal is None:
        return Row(f"{title}, whole call", "us", found["ours"], found["peft"], found["base"], goal=0.6)
    added = {name: found[name] - found["base"] for name in ("peft", "ours")}
    return Row(f"{title}, added to nn.Linear", "us", added["ours"], added["peft"], goal=goal)


@torch.no_grad()
def prefill(width: int) -> Row:
    base = Stack(width).to(torch.bfloat16)
    theirs, ours = both(base, target_modules=STACK, r=16)
    x = torch.randn(4, 128, width).to(torch.bfloat16)
    same(theirs(x), ours(x), 5e-2)
    found = pair({"base": lambda: base(x), "peft": lambda: theirs(x), "ours": lambda: ours(x)})
    ms = {name: spread.median * 1e3 for name, spread in found.items()}
    title = f"prefill 4 x 128, bfloat16, width {width}"
    return Row(title, "ms", ms["ours"], ms["peft"], ms["base"], goal=1.04, goal_is_to_floor=True)


def step_of(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x.detach().requires_grad_()).float().pow(2).mean().backward()


def step(dtype: torch.dtype, width: int, goal: float) -> Row:
    base = Stack(width).to(dtype)
    theirs, ours = both(base, target_modules=STACK, r=16, lora_dropout=0.05)
    hand = by_hand(ours)
    x = torch.randn(4, 128, width).to(dtype)
    same(theirs.eval()(x), ours.eval()(x), 5e-2 if dtype is torch.bfloat16 else 1e-4)
    models = {"floor": base, "peft": theirs.train(), "hand": hand.train(), "ours": ours.train()}
    found = pair({name: (lambda m=model: step_of(m, x)) for name, model in models.items()}, rounds=9)  # type: ignore[misc]
    ms = {name: spread.median * 1e3 for name, spread in found.items()}
    title = f"training step, {name_of(dtype)}, dropout 0.05, width {width}"
    note = f"plain torch by hand: {ms['hand']:.3g} ms"
    return Row(title, "ms", ms["ours"], ms["peft"], ms["floor"], goal=goal, note=note)


class ByHand(nn.Module):
    """LoRA as anyone would write it: y = W x + s B(A(dropout(x)))."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.A, self.B, self.s = base, nn.Parameter(A.clone()), nn.Parameter(B.clone()), scaling

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.dropout(x, 0.05, self.training).to(self.A.dtype)
        y: Tensor = self.base(x)
        return (y + low @ self.A.T @ self.B.T * self.s).to(y.dtype)


def by_hand(ours: nn.Module) -> nn.Module:
    made = [
        ByHand(
            layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        )
        for layer in ours.layers  # type: ignore[union-attr]
    ]
    return nn.Sequential(*made)


def kept_for_backward(dtype: torch.dtype, dropout: float, width: int, goal: float) -> Row:
    base = Stack(width).to(dtype)
    theirs, ours = both(base, target_modules=STACK, r=16, lora_dropout=dropout)
    x = torch.randn(4, 128, width).to(dtype)
    found = {}
    for name, model in (("floor", base), ("peft", theirs.train()), ("ours", ours.train())):
        start = x.detach().requires_grad_()
        with saved_bytes() as count:
            y = model(start)
        found[name] = count() / 2**20
        del y
    own = {name: found[name] - found["floor"] for name in ("peft", "ours")}
    title = f"LoRA's own bytes kept for backward, {name_of(dtype)}, dropout {dropout}"
    return Row(title, "MiB", own["ours"], own["peft"], goal=goal)
