"""Whatever is merged, switched, trained, added and deleted, and in whatever order: the output is the exact sum.

The model is compared with float64 arithmetic on the adapters' factors, W + sum of scaling B A over what should be in
effect, after every step of random sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.tree import find_state
from peftlite.errors import StateError
from tests.contract.rows import scramble

NAMES = ("a", "b", "c")
LAYERS = ("0", "2")
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
names = st.sampled_from(NAMES)
some_names = st.lists(names, min_size=1, unique=True)


class Sequences(RuleBasedStateMachine):
    """A model, and what should hold of it: factors by adapter, who is active, who is merged, who is merged for good."""

    @initialize()
    def begin(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.factors: dict[str, dict[str, tuple[Tensor, Tensor, float]]] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.fixed: list[str] = []
        self.enabled = True
        self.add("a")

    # ---- steps
    @rule(name=names)
    def add(self, name: str) -> None:
        if name in self.factors:
            return
        first = not self.factors
        config = LoraConfig(r=2 + len(self.factors), lora_alpha=3, target_modules=list(LAYERS))
        peftlite.inject(self.model, config, name)
        scramble(self.model, name)
        self.note(name)
        self.active = [name] if first else self.active
        self.enabled = self.enabled or first

    @rule(chosen=some_names)
    def use(self, chosen: list[str]) -> None:
        if set(chosen) <= set(self.factors) and self.allowed(
            set(self.fixed) <= set(chosen), lambda: peftlite.set_adapter(self.model, chosen)
        ):
            self.active, self.merged = chosen, [name for name in self.merged if name in chosen]

    @rule(chosen=some_names, undo=st.sampled_from(["device", "cpu", "cpu", "device", None]), safe=st.booleans())
    def merge(self, chosen: list[str], undo: Any, safe: bool) -> None:
        if set(chosen) <= set(self.factors) and self.allowed(
            self.enabled, lambda: peftlite.merge_adapter(self.model, chosen, safe, undo=undo)
        ):
            self.merged += [name for name in chosen if name not in self.merged]
            self.fixed = list(self.merged) if undo is None else self.fixed

    @rule(chosen=some_names)
    def unmerge(self, chosen: list[str]) -> None:
        if set(chosen) <= set(self.factors) and self.allowed(
            not set(chosen) & set(self.fixed), lambda: peftlite.unmerge_adapter(self.model, chosen)
        ):
            self.merged = [name for name in self.merged if name not in chosen]

    @rule(name=names)
    def train(self, name: str) -> None:
        if name not in self.factors or name in self.merged or name not in self.active or not self.enabled:
            return
        peftlite.set_requires_grad(self.model, name)
        owned = [p for layer in self.layers().values() for p in layer.parameters_of(name)]
        optimizer = torch.optim.SGD(owned, lr=0.05)
        self.model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        self.note(name)

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name not in self.factors or len(self.factors) == 1 or self.active == [name]:
            return
        if self.allowed(name not in self.fixed, lambda: peftlite.delete_adapter(self.model, name)):
            del self.factors[name]
            self.active = [one for one in self.active if one != name]
            self.merged = [one for one in self.merged if one != name]

    @rule()
    def disable(self) -> None:
        if self.allowed(not self.fixed, lambda: peftlite.disable_adapters(self.model)):
            self.enabled, self.merged = False, []

    @rule()
    def enable(self) -> None:
        peftlite.enable_adapters(self.model)
        self.enabled = True

    @rule()
    @precondition(lambda self: not self.fixed)
    def look_at_the_base(self) -> None:
        with peftlite.disable_adapter(self.model):
            torch.testing.assert_close(self.model(X).double(), self.truth([]), rtol=1e-5, atol=1e-5)

    # ---- what should hold
    def layers(self) -> dict[str, Any]:
        return {path: self.model.get_submodule(path) for path in LAYERS}

    def note(self, name: str) -> None:
        """Remember an adapter's factors, which nothing but training may change."""
        self.factors[name] = {
            path: (layer.lora_A[name].weight.clone(), layer.lora_B[name].weight.clone(), layer.scaling[name])
            for path, layer in self.layers().items()
        }

    def allowed(self, expected: bool, call: Any) -> bool:
        if expected:
            call()
            return True
        try:
            call()
        except StateError:
            return False
        raise AssertionError("it should have been refused")

    def truth(self, effective: list[str]) -> Tensor:
        y = X.double()
        for path in LAYERS:
            W = self.base[f"{path}.weight"].double()
            for name in effective:
                A, B, scaling = self.factors[name][path]
                W = W + scaling * (B.double() @ A.double())
            y = y @ W.T + self.base[f"{path}.bias"].double()
            y = y.tanh() if path == "0" else y
        return y.detach()

    @invariant()
    def the_output_is_the_sum(self) -> None:
        effective = sorted({*self.merged, *(self.active if self.enabled else ())})
        torch.testing.assert_close(self.model(X).double().detach(), self.truth(effective), rtol=1e-4, atol=1e-4)

    @invariant()
    def what_is_not_merged_has_the_base_weights(self) -> None:
        state = find_state(self.model)
        assert state is not None
        assert list(state.active) == self.active
        for path, layer in self.layers().items():
            assert sorted(layer.merged_adapters) == sorted(self.merged)
            assert self.merged or torch.equal(layer.base_layer.weight, self.base[f"{path}.weight"])
            assert torch.equal(layer.base_layer.bias, self.base[f"{path}.bias"])

    def teardown(self) -> None:
        if not self.fixed and self.factors:
            peftlite.unmerge_adapter(self.model)
            assert all(torch.equal(layer.own().weight, self.base[f"{p}.weight"]) for p, layer in self.layers().items())


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
