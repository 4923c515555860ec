"""Beginnings that need data (CorDA, LoRA-GA, EVA) or quantise (LoftQ), against real PEFT, definitions and promises."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlite
from peftlite import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig
from peftlite.core.tree import layers
from peftlite.tuners.lora.inits.loftq import approximate, rounded
from peftlite.tuners.lora.inits.pca import IncrementalPCA
from tests.lora.test_inits import factors, train
from tests.models import batch, tiny
from tests.tuners.pairs import apart

FIELDS: dict[str, Any] = {"r": 3, "lora_alpha": 6, "target_modules": ["layer", "last"]}


class Net(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer: nn.Module = Conv1D(10, 12) if transposed else nn.Linear(12, 10)
        nn.init.normal_(self.layer.weight, std=0.4)
        self.last = nn.Linear(10, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.layer(x).tanh())
        return y


def samples(count: int = 2) -> list[Tensor]:
    torch.manual_seed(2)
    mix = torch.randn(12, 12)
    return [(1 + 3 * k) * torch.randn(40, 12) @ mix for k in range(count)]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that preparing may not change."""
    own = [
        (sorted(m.__dict__.keys()), len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
        for m in model.modules()
    ]
    return own, [(p.requires_grad, p.grad, p._version) for p in model.parameters()]


# ---- CorDA
def corda(method: str, **fields: Any) -> LoraConfig:
    return LoraConfig(**FIELDS, init_lora_weights="corda", corda_config=CordaConfig(corda_method=method, **fields))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_peft_s(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))  # all it takes
    from peft.tuners.lora.config import CordaConfig as TheirCordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    ours, theirs, x = Net(), Net(), torch.randn(5, 12)
    their = TheirCordaConfig(corda_method=method)
    their_config = peft.LoraConfig(**FIELDS, init_lora_weights="corda", corda_config=their)
    peftlite.preprocess_corda(ours, corda(method), lambda: [ours(x) for x in samples()] and None)
    preprocess_corda(theirs, their_config, run_model=lambda: [theirs(x) for x in samples()])
    one, other = peftlite.get_peft_model(ours, corda(method)), peft.get_peft_model(theirs, their_config)
    for name in ("layer", "last"):
        B, A, D, C = (
            getattr(getattr(model.base_model.model, name), slot)["default"].weight
            for model in (one, other)
            for slot in ("lora_B", "lora_A")
        )
        assert apart(B @ A, D @ C) <= 2e-5
    train(one)
    other.load_state_dict(factors(one), strict=False)
    assert apart(one(x), other(x)) <= 5e-6


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "Conv1D"])
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_its_definition(method: str, transposed: bool) -> None:
    model, batches = Net(transposed), samples()
    weight = model.layer.weight.detach()
    W = (weight.T if transposed else weight).double()
    before = snapshot(model)
    peftlite.preprocess_corda(model, corda(method), lambda: [model(x) for x in batches] and None)
    assert snapshot(model) == before
    scaled = [(x / x.max().abs()).double() for x in batches]
    C = sum(x.T @ x for x in scaled)
    C = C + 0.01 * C.diagonal().mean() * torch.eye(12)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    part = slice(0, 3) if method == "ipm" else slice(7, 10)
    expected = (U[:, part] * S[part]) @ Vh[part] @ C.inverse()
    peftlite.inject_adapter_in_model(corda(method), model)
    A, B = (model.layer.container(slot)["default"].weight for slot in ("lora_A", "lora_B"))
    assert apart(2 * (B @ A).double(), expected) <= 1e-4
    assert torch.equal(model(batches[0]), Net(transposed)(batches[0]))


def test_corda_reads_what_it_has_written(tmp_path: Path) -> None:
    files = {"cache_file": str(tmp_path / "cache"), "covariance_file": str(tmp_path / "covariance")}
    built = []
    for run in (lambda model: [model(x) for x in samples()], None, None):
        model = Net()
        config = corda("ipm", **files)
        peftlite.preprocess_corda(model, config, run and (lambda: run(model)))  # noqa: B023 - called at once
        built.append(peftlite.inject_adapter_in_model(config, model))
        (tmp_path / "cache").unlink()
    assert all(torch.equal(built[0].state_dict()[k], other.state_dict()[k]) for other in built for k in factors(other))


NOT_PREPARED: list[tuple[str, dict[str, Any]]] = [("corda", {}), ("lora_ga", {})]


@pytest.mark.parametrize(("init", "fields"), NOT_PREPARED)
def test_what_was_not_prepared_is_said(init: str, fields: dict[str, Any]) -> None:
    model = Net()
    with pytest.raises(peftlite.errors.StateError, match=f"call `preprocess_{init.replace('_', '')}`"):
        peftlite.inject_adapter_in_model(LoraConfig(**FIELDS, init_lora_weights=init, **fields), model)
    assert type(model.layer) is nn.Linear
    with pytest.raises(peftlite.errors.StateError, match="did not reach `layer`"):
        peftlite.preprocess_corda(model, corda("ipm"), lambda: None)


# ---- LoRA-GA
def loraga(**fields: Any) -> LoraConfig:
    return LoraConfig(**FIELDS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**fields))


def step(model: nn.Module) -> Callable[[], None]:
    return lambda: sum(model(x).square().mean() for x in samples()).backward()  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # PEFT's hooks
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_loraga_is_peft_s(direction: str, scale: str) -> None:
    options = {"direction": direction, "scale": scale, "stable_gamma": 4}
    ours, theirs = Net(), Net()
    their_config = peft.LoraConfig(**FIELDS, init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(**options))
    before = snapshot(ours)
    peftlite.preprocess_loraga(ours, loraga(**options), step(ours))
    assert snapshot(ours) == before
    peft.preprocess_loraga(theirs, their_config, step(theirs))
    one, other = peftlite.get_peft_model(ours, loraga(**options)), peft.get_peft_model(theirs, their_config)
    for name in ("layer", "last"):
        mine, other_layer = getattr(one.base_model.model, name), getattr(other.base_model.model, name)
        for slot, dim in (("lora_A", 1), ("lora_B", 0)):
            a, b = (layer.container(slot) if layer is mine else getattr(layer, slot) for layer in (mine, other_layer))
            a, b = a["default"].weight, b["default"].weight
            cosines = torch.cosine_similarity(a.detach(), b.detach(), dim)  # each component's sign is free
            assert float((cosines.abs() - 1).abs().max()) <= 1e-4
            assert apart(a.norm(dim=dim), b.norm(dim=dim)) <= (
                5e-3 if scale == "weight_svd" else 1e-4
            )  # it estimates |W|
    x = samples()[0]
    assert torch.equal(one(x), Net()(x))


def test_loraga_needs_no_gradients_of_the_weights_and_reads_what_it_has_written(tmp_path: Path) -> None:
    file, built = str(tmp_path / "gradients"), []
    for train_step in (step, None):
        model = Net().requires_grad_(False)
        peftlite.preprocess_loraga(model, loraga(), train_step and train_step(model), cache_file=file)  # type: ignore
        built.append(peftlite.inject_adapter_in_model(loraga(), model))
    assert all(torch.equal(built[0].state_dict()[key], value) for key, value in factors(built[1]).items())


def prepared(init: str, seed: int = 2) -> Any:
    """In place, with an adapter that began from data."""
    model, config = Net(), corda("ipm") if init == "corda" else loraga()
    if init == "corda":
        data = samples() if seed == 2 else [torch.randn(40, 12)]
        peftlite.preprocess_corda(model, config, lambda: [model(x) for x in data] and None)
    else:
        peftlite.preprocess_loraga(model, config, step(model))
    return peftlite.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_files_are_plain_lora_since_nobody_could_know_what_is_subtracted(init: str, tmp_path: Path) -> None:
    model, x = prepared(init), samples()[0]
    train(model)
    peftlite.save_adapter(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.layer.lora_A.weight"].shape == (6, 12)
    for library in (peftlite, peft):
        assert apart(library.PeftModel.from_pretrained(Net(), tmp_path)(x), model(x)) <= 2e-6


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_training_goes_on_from_such_a_file(init: str, tmp_path: Path) -> None:
    model = prepared(init)
    train(model)
    peftlite.save_adapter(model, tmp_path)
    again = prepared(init)
    peftlite.load_adapter(again, tmp_path)
    assert all(torch.equal(value, factors(model)[key]) for key, value in factors(again).items())
    if init == "corda":
        with pytest.raises(peftlite.errors.CheckpointError, match="other first factors"):
            peftlite.load_adapter(prepared(init, seed=3), tmp_path)


# ---- EVA
class Wide(nn.Module):
    """Layers whose inputs differ in how many directions matter; two of them see the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.steep, self.flat = nn.Linear(12, 10), nn.Linear(12, 10)
        self.same, self.also = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        steep, flat, same = (part.contiguous() for part in x.split([12, 12, 16], 1))
        return self.steep(steep), self.flat(flat), self.same(same), self.also(same)


SCALES = [torch.tensor([base**-k for k in range(size)]) for base, size in ((3.0, 12), (1.03, 12), (1.3, 16))]
RAW: dict[str, Any] = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}
NAMES = ["steep", "flat", "same", "also"]


def wide_samples() -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(400, 40) * torch.cat(SCALES) + 2 for _ in range(4)]


def eva(library: Any = peftlite, **fields: Any) -> Any:
    config = library.EvaConfig(**fields)
    return library.LoraConfig(r=4, lora_alpha=8, target_modules=NAMES, init_lora_weights="eva", eva_config=config)


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")  # PEFT's
@pytest.mark.parametrize("fields", [{}, {"rho": 1.0}, {"adjust_scaling_factors": False}, {"whiten": True}])
def test_eva_gives_peft_s_ranks_and_the_true_directions(fields: dict[str, Any]) -> None:
    x = wide_samples()
    states = [lib.get_eva_state_dict(Wide(), x, eva(lib, **fields), **RAW) for lib in (peftlite, peft)]
    assert {name: len(A) for name, A in states[0].items()} == {name: len(A) for name, A in states[1].items()}
    steep = torch.cat(x)[:, :12]
    truth = torch.linalg.svd((steep - steep.mean(0)).double())[2]
    mine, theirs = (state["steep"].double() for state in states)
    cosines = [(torch.nn.functional.normalize(A, dim=1) * truth[: len(A)]).sum(1).abs().min() for A in (mine, theirs)]
    assert cosines[0] >= cosines[1] - 1e-6
    if not fields.get("whiten"):
        assert apart(mine @ mine.T, torch.eye(len(mine)).double()) <= 1e-5
    models = []
    for library in (peftlite, peft):
        models.append(library.get_peft_model(Wide(), eva(library, **fields)))
        library.initialize_lora_eva_weights(models[-1], x, **RAW)
    for name in NAMES:
        one, other = (getattr(model.base_model.model, name) for model in models)
        assert (one.r["default"], one.scaling["default"]) == (other.r["default"], other.scaling["default"])
        assert one.lora_A["default"].weight.requires_grad
    ours, theirs_config = (model.peft_config["default"] for model in models)
    assert (ours.r, ours.rank_pattern) == (theirs_config.r, theirs_config.rank_pattern)
    assert ours.alpha_pattern == theirs_config.alpha_pattern
    assert all(torch.equal(a, b) for a, b in zip(models[0](x[0]), Wide()(x[0]), strict=True))


@pytest.mark.filterwarnings("ignore:lora with eva initialization:UserWarning")  # PEFT's
def test_eva_adapters_are_read_both_ways(tmp_path: Path) -> None:
    x, written = wide_samples(), {}
    for library in (peftlite, peft):
        model = library.get_peft_model(Wide(), eva(library))
        library.initialize_lora_eva_weights(model, x, **RAW)
        train(model)
        written[library] = model(x[0])
        model.save_pretrained(tmp_path / library.__name__)
    for library, other in ((peftlite, peft), (peft, peftlite)):
        read = library.PeftModel.from_pretrained(Wide(), tmp_path / other.__name__)(x[0])
        assert all(apart(a, b) <= 2e-6 for a, b in zip(read, written[other], strict=True))


class Uneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.small, self.huge = nn.Linear(12, 10), nn.Linear(300, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.small(x[:, :12].contiguous()), self.huge(x[:, 12:].contiguous())


def test_layers_that_eva_gives_no_rank_lose_the_adapter() -> None:
    x = [torch.randn(400, 312) for _ in range(3)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["small", "huge"], init_lora_weights="eva")
    model: Any = peftlite.inject_adapter_in_model(config, Uneven())
    peftlite.initialize_lora_eva_weights(model, x, **RAW)
    assert type(model.huge) is nn.Linear
    assert model.small.r["default"] == 8
    final = peftlite.core.lifecycle.state_of(model).configs["default"]
    assert final.target_modules == ["small"]
    assert final.for_site("small").r == 8
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "small.lora_A.default.weight",
        "small.lora_B.default.weight",
    ]


def test_eva_looks_at_the_tokens_that_have_labels() -> None:
    data = [batch("llama", rows=4, length=12, seed=seed) for seed in range(3)]
    for inputs in data:
        inputs["labels"][:, :5] = -100
        inputs["attention_mask"][1, :7] = 0
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights="eva")
    masked = peftlite.get_eva_state_dict(tiny("llama"), data, config, show_progress_bar=False)
    blind = copy.deepcopy(config)
    blind.eva_config = EvaConfig(use_label_mask=False)
    whole = peftlite.get_eva_state_dict(tiny("llama"), data, blind, show_progress_bar=False)
    theirs = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig()
    )
    expected = peft.get_eva_state_dict(tiny("llama"), data, theirs, show_progress_bar=False)
    assert masked.keys() == expected.keys()
    assert torch.equal(masked["model.layers.0.self_attn.q_proj"], masked["model.layers.0.self_attn.k_proj"])
    first = "model.layers.0.self_attn.q_proj"
    assert masked[first].shape == expected[first].shape
    assert (masked[first] * expected[first]).sum(1).abs().min() > 0.98
    assert (masked[first] * whole[first]).sum(1).abs().min() < 0.98


def test_eva_refuses_what_does_not_fit() -> None:
    model = peftlite.inject_adapter_in_model(eva(), Wide())
    for given, reason in (
        ({"eva_state_dict": {"steep": torch.randn(2, 5)}}, "shape"),
        ({"eva_state_dict": {"typo": torch.randn(2, 12)}}, "typo"),
        ({}, "dataloader"),
    ):
        with pytest.raises(peftlite.errors.ConfigError, match=reason):
            peftlite.initialize_lora_eva_weights(model, **given)
    with pytest.raises(peftlite.errors.StateError, match="no batches"):
        peftlite.initialize_lora_eva_weights(model, [], **RAW)
    assert all(layer.r["default"] == 4 for layer in layers(model))


def test_batches_give_what_all_rows_at_once_give() -> None:
    rows = torch.randn(500, 20) @ torch.diag(torch.linspace(2, 0.1, 20)) + 3
    analysis = IncrementalPCA(20)
    for part in rows.split([3, 10, 100, 387]):
        analysis.add(part)
    centred = (rows - rows.mean(0)).double()
    _, S, Vh = torch.linalg.svd(centred, full_matrices=False)
    assert apart(analysis.values.double(), S) <= 1e-4
    assert apart((analysis.components.double() * Vh).sum(1).abs(), torch.ones(20).double()) <= 1e-3
    assert apart(analysis.ratios.double(), S.square() / S.square().sum()) <= 1e-4


# ---- LoftQ
def loftq(**fields: Any) -> LoraConfig:
    return LoraConfig(**{**FIELDS, "init_lora_weights": "loftq", "loftq_config": LoftQConfig(), **fields})


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_comes_nearer_than_rounding_alone_and_with_each_round(bits: int) -> None:
    torch.manual_seed(0)
    W = 0.1 * torch.randn(64, 128)
    missed = [float((W - rounded(W, bits)).norm())]
    for rounds in (1, 5):
        Q, A, B = approximate(W, 8, 2.0, bits, rounds)
        assert torch.equal(rounded(Q, bits), Q)
        missed.append(float((W - Q - 2.0 * B @ A).norm()))
    assert missed[0] > missed[1] > missed[2]
    peft_4_bit = {"one round": 0.07734711, "five": 0.06553975}  # PEFT 0.21.2's errors with these weights and alpha = r
    if bits == 4:
        assert missed[1] / float(W.norm()) <= 1.05 * peft_4_bit["one round"]
        assert missed[2] / float(W.norm()) <= 1.05 * peft_4_bit["five"]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_comes_as_near_as_peft_s(bits: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    W = torch.randn(64, 128) / 10
    to = Tensor.to

    def stay(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # PEFT's asks for a GPU
        args = tuple("cpu" if str(arg) == "cuda" else arg for arg in args)
        return to(t, *args, **{name: "cpu" if name == "device" else value for name, value in kwargs.items()})

    monkeypatch.setattr(Tensor, "to", stay)
    monkeypatch.setattr(Tensor, "cuda", lambda t, *_, **__: t)
    Q, A, B = peft.utils.loftq_utils.loftq_init(W, num_bits=bits, reduced_rank=8, num_iter=rounds)
    theirs = (W - Q - B @ A).norm()
    Q, A, B = approximate(W, 8, 1.0, loftq_bits=bits, loftq_iter=rounds)
    assert (W - Q - B @ A).norm() <= theirs * (1 + 1e-5)


def test_nf4_is_bitsandbytes_s() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(32, 64)
    packed, state = functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    assert apart(rounded(W, 4), functional.dequantize_4bit(packed, state)) <= 1e-6


def test_loftq_leaves_a_base_of_few_bits_and_reloads(tmp_path: Path) -> None:
    model, x = Net(), torch.randn(5, 12)
    W = model.layer.weight.detach().clone()
    peftlite.inject_adapter_in_model(loftq(), model)
    Q = model.layer.base_layer.weight
    assert torch.equal(Q, rounded(W, 4))
    A, B = (model.layer.container(slot)["default"].weight for slot in ("lora_A", "lora_B"))
    assert (W - Q - 2 * B @ A).norm() < 0.8 * (W - Q).norm()
    train(model)
    expected = model(x)
    peftlite.save_adapter(model, tmp_path)
    for base in (Net(), peftlite.unload(model)):  # the original weights, and the rounded ones
        peftlite.load_adapter(base, tmp_path)
        assert apart(base(x), expected) <= 1e-6


def test_loftq_never_writes_into_weights_of_others() -> None:
    base = Net()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    twin = peftlite.overlay(base)
    peftlite.inject_adapter_in_model(loftq(), twin)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert not torch.equal(twin.layer.base_layer.weight, base.layer.weight)


def test_quantised_layers_get_loftq_s_factors_afterwards(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    original = nn.Linear(128, 64)
    nn.init.normal_(original.weight, std=0.1)
    save_file({"layer.weight": original.weight.detach()}, tmp_path / "model.safetensors")
    packed = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
    packed.load_state_dict(original.state_dict())
    model = nn.Sequential()
    model.add_module("layer", packed.to("cpu"))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["layer"])
    wrapped = peftlite.get_peft_model(model, config)
    x = torch.randn(5, 128)
    expected = original(x)
    before = apart(wrapped(x), expected)
    seen: list[str] = []
    peftlite.replace_lora_weights_loftq(wrapped, str(tmp_path), callback=lambda m, name: bool(seen.append(name)))
    assert seen == ["base_model.model.layer"]
    assert apart(wrapped(x), expected) == before
    peftlite.replace_lora_weights_loftq(wrapped, str(tmp_path / "model.safetensors"))
    assert apart(wrapped(x), expected) < 0.95 * before
    with pytest.raises(peftlite.errors.UnsupportedLayerError, match="replace_lora_weights_loftq"):
        peftlite.inject_adapter_in_model(loftq(target_modules=["layer"]), model, "other")
    with pytest.raises(peftlite.errors.ConfigError, match=r"model\.safetensors"):
        peftlite.replace_lora_weights_loftq(wrapped)


# ---- PEFT's form of what is subtracted
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["pissa", "dora"])
def test_the_residual_can_be_written_into_the_base(fields: dict[str, Any], tmp_path: Path) -> None:
    model, x = Net(), torch.randn(5, 12)
    config = LoraConfig(**FIELDS, init_lora_weights="pissa", **fields)
    peftlite.inject_adapter_in_model(config, model)
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**FIELDS, init_lora_weights="pissa", **fields))
    train(model)
    expected = model(x)
    peftlite.residual_into_base(model)
    assert apart(model(x), expected) <= 1e-6
    assert apart(model.layer.base_layer.weight, theirs.base_model.model.layer.base_layer.weight) <= 1e-6
    peftlite.save_adapter(model, tmp_path)
    residual = peftlite.unload(model)
    for library in (peft, peftlite):
        assert apart(library.PeftModel.from_pretrained(copy.deepcopy(residual), tmp_path)(x), expected) <= 1e-6
    with pytest.raises(peftlite.errors.StateError, match="nothing is subtracted"):
        peftlite.residual_into_base(peftlite.inject_adapter_in_model(LoraConfig(**FIELDS), Net()))
