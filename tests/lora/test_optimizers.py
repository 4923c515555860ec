"""LoRA+ sorts parameters as PEFT does; LoRA-FA takes the steps of its formula, and PEFT's but for PEFT's rounding."""

from __future__ import annotations

import copy
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig, create_lorafa_optimizer, create_loraplus_optimizer
from peftlite.core.tree import layers
from peftlite.errors import ConfigError, NoAdapterError, StateError
from tests.contract.rows import KINDS, Holder, scramble
from tests.contract.test_laws import snapshot
from tests.lora.test_combine import Odd
from tests.models import batch, tiny
from tests.twins import Twins, twins


class Net(nn.Module):
    """One layer of each kind that groups tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(9, 6), nn.Linear(6, 5)
        self.norm, self.second, self.head = nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.norm(self.first(self.table(x)))))
        return y


def groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[list[str], Any, Any]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [([names[id(p)] for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


@pytest.mark.parametrize("options", [{}, {"loraplus_weight_decay": 0.2}, {"loraplus_lr_embedding": 1e-3}], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"modules_to_save": ["head", "norm"]}, {"bias": "all"}, {"lora_bias": True}, {"use_dora": True}],
    ids=str,
)
def test_loraplus_has_the_groups_of_peft(fields: dict[str, Any], options: dict[str, Any]) -> None:
    targets = ["first", "second"] if "lora_bias" in fields else ["table", "first", "second"]
    found = []
    for library, make in ((peftlite, create_loraplus_optimizer), (peft, peft.optimizers.create_loraplus_optimizer)):
        model = library.get_peft_model(Net(), library.LoraConfig(target_modules=targets, **fields))
        optimizer = make(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8, betas=(0.8, 0.9), **options)
        assert type(optimizer) is torch.optim.AdamW
        assert optimizer.defaults["betas"] == (0.8, 0.9)
        found.append(groups(optimizer, model))
    magnitude = "base_model.model.table.lora_magnitude_vector.default.weight"  # PEFT sorts an embedding's under B
    for group in found[0] + found[1]:
        group[0][:] = [name for name in group[0] if name != magnitude]
    assert found[0] == found[1]


def test_weight_decay_is_not_forgotten() -> None:
    model = peftlite.get_peft_model(Net(), LoraConfig(target_modules=["first"], bias="all"))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.1, 0.0]


def train(both: Twins, ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, steps: int) -> float:
    """Train both; gives how far the adapters are apart, relative to how far they went."""
    start = {name: p.detach().clone() for name, p in both.ours.named_parameters()}
    for _ in range(steps):
        for model, optimizer in ((both.ours, ours), (both.theirs, theirs)):
            optimizer.zero_grad()
            model(**both.inputs).loss.backward()
            optimizer.step()
    reference = dict(both.theirs.named_parameters())
    trained = {name: p for name, p in both.ours.named_parameters() if p.requires_grad}
    apart = torch.cat([(p - reference[name]).flatten() for name, p in trained.items()])
    went = torch.cat([(p - start[name]).flatten() for name, p in trained.items()])
    assert all(torch.equal(p, start[name]) for name, p in both.ours.named_parameters() if name not in trained)
    return float((apart.norm() / went.norm()).detach())


def test_loraplus_takes_the_steps_of_peft() -> None:
    both = twins("llama", target_modules=["q_proj", "v_proj"], r=3, modules_to_save=["lm_head"])
    options = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.01}
    ours = create_loraplus_optimizer(both.ours, torch.optim.AdamW, **options)  # type: ignore[arg-type]
    theirs = peft.optimizers.create_loraplus_optimizer(both.theirs, torch.optim.AdamW, **options)
    assert train(both, ours, theirs, 4) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
def test_lorafa_takes_the_steps_of_peft(fields: dict[str, Any]) -> None:
    both = twins("llama", target_modules=["q_proj", "v_proj"], r=3, modules_to_save=["lm_head"], **fields)
    options = {"r": 3, "lora_alpha": 8, "lr": 1e-3, "weight_decay": 0.1}
    ours = create_lorafa_optimizer(both.ours, **options)  # type: ignore[arg-type]
    theirs = peft.optimizers.create_lorafa_optimizer(both.theirs, **options)
    assert [n for n, p in both.ours.named_parameters() if p.requires_grad] == [
        n for n, p in both.theirs.named_parameters() if p.requires_grad
    ]
    assert train(both, ours, theirs, 4) < 2e-2  # PEFT multiplies in bfloat16


def exact_steps(A: Tensor, B: Tensor, grads: list[Tensor], scaling: float, lr: float, decay: float) -> Tensor:
    """The paper's correction and AdamW, in float64 and in so many words."""
    A, B = A.double(), B.double()
    mean, square = torch.zeros_like(B), torch.zeros_like(B)
    for step, grad in enumerate(grads, start=1):
        corrected = grad.double() @ torch.linalg.inv(A @ A.T) / scaling**2
        mean = 0.9 * mean + 0.1 * corrected
        square = 0.999 * square + 0.001 * corrected**2
        B = B - lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-6 / (1 - 0.999**step) ** 0.5)
        B = B * (1 - lr * decay)
    return B


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lorafa_takes_the_steps_of_its_formula(dtype: torch.dtype) -> None:
    model = Holder(KINDS["linear"]).to(dtype)
    peftlite.inject(model, LoraConfig(r=3, lora_alpha=5, target_modules=["layer"]), autocast_adapter_dtype=False)
    scramble(model, "default")
    optimizer = create_lorafa_optimizer(model, 3, 5, lr=0.01, weight_decay=0.1)
    layer = next(layers(model))
    A, B = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight
    grads = [torch.randn_like(B) for _ in range(4)]
    wanted = exact_steps(A, B.detach().clone(), grads, 5 / 3, 0.01, 0.1)
    for grad in grads:
        B.grad = grad
        optimizer.step()
    torch.testing.assert_close(B.double(), wanted, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)
    assert torch.equal(layer.lora_A["default"].weight, A)


@pytest.mark.parametrize("kind", ["conv1d", "conv1d-torch", "conv2d", "conv2d-groups", "conv3d", "embedding", "odd"])
def test_lorafa_follows_the_gradient_of_the_weight_on_every_kind_of_layer(kind: str) -> None:
    """(A A^T)^-1 / scaling^2 makes a step of B the step of the weight, projected on what A leaves possible."""
    if kind == "odd":
        model: nn.Module = Odd()
        targets: dict[str, Any] = {"target_modules": ["attention", "linear"], "target_parameters": ["experts.weight"]}
        x = torch.randn(5, 12)
    else:
        model, targets, x = Holder(KINDS[kind]), {"target_modules": ["layer"]}, KINDS[kind].feed(torch.float32)
    peftlite.inject_adapter_in_model(LoraConfig(r=4, **targets), model)
    scramble(model, "default")
    wanted = model(x).detach()
    scramble(model, "default", seed=9)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.02)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - wanted).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_lorafa_with_a_bias_and_dora_trains_all_but_a() -> None:
    for fields in ({"lora_bias": True}, {"use_dora": True}, {"bias": "all"}):
        model = peftlite.get_peft_model(tiny("opt"), LoraConfig(target_modules=["q_proj"], **fields))
        scramble(model, "default")
        optimizer = create_lorafa_optimizer(model, 8, 8, lr=1e-2)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(**batch("opt")).loss.backward()
        optimizer.step()
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) is not (p.requires_grad and p.grad is not None), name
            assert not (p.requires_grad and "lora_A" in name)


def test_a_stays_frozen_whatever_is_switched() -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]), "x")
    model.add_adapter("y", LoraConfig(target_modules=["q_proj"]))
    create_lorafa_optimizer(model, 8, 8, lr=1e-2)
    wanted = {"x": ["lora_B"], "y": ["lora_A", "lora_B"]}
    for other in (model, copy.deepcopy(model)):
        for name in ("y", "x", "y", "x"):
            other.set_adapter(name)
            with other.disable_adapter():
                pass
            trained = [n.split(".")[-3] for n, p in other.named_parameters() if p.requires_grad]
            assert sorted(set(trained)) == wanted[name]


def test_a_checkpoint_of_the_optimizer_goes_on_where_it_was() -> None:
    def run(stop: int | None) -> Tensor:
        torch.manual_seed(1)
        model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
        scramble(model, "default", 3)
        optimizer = create_lorafa_optimizer(model, 8, 8, lr=1e-2)
        for at in range(4):
            optimizer.zero_grad()
            model(**batch("llama")).loss.backward()
            optimizer.step()
            if at == stop:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = create_lorafa_optimizer(model, 8, 8, lr=5.0)
                optimizer.load_state_dict(saved)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(run(None), run(1))


def test_a_closure_computes_the_loss_again() -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    optimizer = create_lorafa_optimizer(model, 8, 8, lr=1e-2)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(**batch("llama")).loss
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) > float(closure().detach())


def test_calls_that_make_no_sense_change_nothing() -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    before = snapshot(model)
    with pytest.raises(ConfigError, match="use_rslora"):
        create_lorafa_optimizer(model, 8, 8, lr=1e-2, use_rslora=True)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=0)
    assert snapshot(model) == before
    model.set_requires_grad("default", False)
    with pytest.raises(StateError, match="set_requires_grad"):
        create_lorafa_optimizer(model, 8, 8, lr=1e-2)
    for call in (
        lambda: create_lorafa_optimizer(tiny("llama"), 8, 8, lr=1e-2),
        lambda: create_loraplus_optimizer(tiny("llama"), torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=8),
    ):
        with pytest.raises(NoAdapterError):
            call()
