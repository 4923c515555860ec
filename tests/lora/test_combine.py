"""A combination of adapters is the weighted sum of what they add to the weights, unless a rank is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftlite
from peftlite import IA3Config, LoHaConfig, LoraConfig, add_weighted_adapter
from peftlite.core.slots import View
from peftlite.core.tree import layers
from peftlite.errors import AdapterNameError, ConfigError, PeftliteWarning
from tests.contract.rows import KINDS, READ_BY_MODULE, Holder, scramble
from tests.contract.test_laws import snapshot
from tests.models import batch, tiny
from tests.twins import Twins, twins

WEIGHTS = [0.7, -1.3]
PLAIN = {"r": 4, "lora_alpha": 8}
OTHER = {"r": 2, "lora_alpha": 3, "use_rslora": True}


class Experts(nn.Module):
    """Fused experts (3, 10, 12), read by the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 10, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->beo", self.weight, x)


class Odd(nn.Module):
    """Layers that are read, not called, beside one that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.attention, self.linear = Experts(), nn.MultiheadAttention(12, 2), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        z: Tensor = self.experts(self.linear(y))
        return z


def with_adapters(model: nn.Module, targets: dict[str, Any], *configs: dict[str, Any]) -> nn.Module:
    """`model` with adapters "a", "b", ... with random weights."""
    for name, fields in zip("abc", configs, strict=False):
        peftlite.inject_adapter_in_model(LoraConfig(**{**targets, **fields}), model, name)
        scramble(model, name)
    return model.eval()


def on_kind(kind: str, *configs: dict[str, Any]) -> nn.Module:
    torch.manual_seed(1)
    return with_adapters(Holder(KINDS[kind]), {"target_modules": ["layer"]}, *configs)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor, *names: str) -> list[Tensor]:
    """What each adapter adds to the output, in float64."""
    exact = copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() else x
    with peftlite.disable_adapter(exact):
        base = exact(x)
    found = []
    for name in names:
        peftlite.set_adapter(exact, name)
        found.append(exact(x) - base)
    return found


def delta(model: nn.Module, name: str) -> Tensor:
    """The update of the only layer's weight, in float64."""
    layer = next(layers(copy.deepcopy(model).double()))
    found: Tensor = layer.variants[name].delta(View(layer, name)).detach()  # type: ignore[attr-defined]
    return found


def off(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).norm() / wanted.norm()).detach())


# ---- exact
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in READ_BY_MODULE])  # those are not linear
@pytest.mark.parametrize("type_", ["linear", "cat", "svd"])
def test_a_sum_is_exact_on_every_kind_of_layer(kind: str, type_: str) -> None:
    model = on_kind(kind, PLAIN, OTHER)
    report = add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum", type_)
    a, b, got = outputs(model, KINDS[kind].feed(torch.float32), "a", "b", "sum")
    assert off(got, WEIGHTS[0] * a + WEIGHTS[1] * b) < 1e-7
    assert (report.relative_error, report.ranks, report.errors) == (0.0, {"layer": 6}, {"layer": 0.0})


def test_a_sum_is_exact_on_experts_and_attention(tmp_path: Path) -> None:
    targets = {"target_modules": ["attention", "linear"], "target_parameters": ["experts.weight"]}
    model, x = with_adapters(Odd(), targets, PLAIN, OTHER), torch.randn(5, 12)
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum")
    for name, wanted in adapted_weights(model, ["a", "b"], WEIGHTS).items():
        assert off(adapted_weights(model, ["sum"], [1.0])[name], wanted) < 1e-7, name
    peftlite.save_adapter(model, tmp_path, selected_adapters=["sum"])
    other = Odd()
    other.load_state_dict(peftlite.unload(copy.deepcopy(model)).state_dict())
    peftlite.load_adapter(other.eval(), tmp_path / "sum")
    peftlite.set_adapter(model, "sum")
    torch.testing.assert_close(other(x), model(x))


def adapted_weights(model: nn.Module, names: list[str], weights: list[float]) -> dict[str, Tensor]:
    """The weighted sum of the updates of every layer, in float64."""
    exact = copy.deepcopy(model).double()
    found: dict[str, Tensor] = {}
    for at, layer in enumerate(layers(exact)):
        terms = [w * layer.variants[n].delta(View(layer, n)) for n, w in zip(names, weights, strict=True)]  # type: ignore[attr-defined]
        found[f"{at} {layer.get_base_layer()}"] = torch.stack(terms).sum(0).detach()
    return found


ranks = st.integers(1, 4)
configs = st.fixed_dictionaries(
    {"r": ranks, "lora_alpha": st.sampled_from([1, 3, 8, 0.7]), "use_rslora": st.booleans(), "lora_bias": st.booleans()}
)
weights = st.floats(-3, 3).map(lambda w: round(w, 3))
sources = st.lists(st.tuples(configs, weights), min_size=1, max_size=3)


@settings(max_examples=40)
@given(sources, st.sampled_from(["linear", "cat", "svd"]))
def test_weights_ranks_scalings_and_biases_add_up(chosen: list[tuple[dict[str, Any], float]], type_: str) -> None:
    model = on_kind("linear", *(config for config, _ in chosen))
    names, factors = "abc"[: len(chosen)], [weight for _, weight in chosen]
    add_weighted_adapter(model, list(names), factors, "sum", type_)
    *parts, got = outputs(model, torch.randn(7, 12), *names, "sum")
    wanted = sum((w * part for w, part in zip(factors, parts, strict=True)), torch.zeros_like(got))
    size = sum(abs(w) * float(part.norm()) for w, part in zip(factors, parts, strict=True))
    assert float((got - wanted).norm()) <= 2e-7 * size


names_of_projections = st.sets(st.sampled_from(["q_proj", "v_proj", "down_proj"]), min_size=1)
patterned = st.fixed_dictionaries(
    {
        "target_modules": names_of_projections.map(sorted),
        "r": ranks,
        "layers_to_transform": st.sampled_from([None, [0], [1]]),
        "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", "layers.1.self_attn.v_proj"]), ranks),
        "alpha_pattern": st.dictionaries(st.sampled_from(["down_proj", "layers.0.self_attn.q_proj"]), st.just(5)),
        "use_rslora": st.booleans(),
    }
)


@pytest.mark.filterwarnings("ignore::peftlite.errors.PeftliteWarning")  # patterns that match no target
@settings(max_examples=12)
@given(st.lists(st.tuples(patterned, weights), min_size=1, max_size=2))
def test_targets_and_patterns_are_joined_and_survive_the_file(chosen: list[tuple[dict[str, Any], float]]) -> None:
    model = tiny("llama")
    for name, (fields, _) in zip("ab", chosen, strict=False):
        peftlite.inject(model, LoraConfig(**fields), name, unmatched="ignore")
        scramble(model, name)
    add_weighted_adapter(model, list("ab"[: len(chosen)]), [weight for _, weight in chosen], "sum", "cat")
    on = {path for path, layer in peftlite.core.tree.named_layers(model) if set(layer.variants) & set("ab")}
    assert on == {path for path, layer in peftlite.core.tree.named_layers(model) if "sum" in layer.variants}
    config, tensors = model.peft_config["sum"], peftlite.get_peft_model_state_dict(model, adapter_name="sum")
    fresh = tiny("llama")
    peftlite.inject(fresh, config, "sum")
    peftlite.set_peft_model_state_dict(fresh, tensors, "sum")
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(**values_for_peft(config)), "sum").eval()
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{key}": t for key, t in tensors.items()}, "sum")
    peftlite.set_adapter(model, "sum")
    with torch.no_grad():
        wanted = model(**batch("llama")).logits
        assert torch.equal(fresh(**batch("llama")).logits, wanted)
        torch.testing.assert_close(theirs(**batch("llama")).logits, wanted, atol=2e-6, rtol=1e-5)


def values_for_peft(config: LoraConfig) -> dict[str, Any]:
    names = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("type_", ["linear", "cat", "svd", "ties", "dare_linear_svd", "magnitude_prune"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True, "r": 3},
        {"lora_bias": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "mica"},
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2}},
        {"use_qalora": True, "qalora_group_size": 4},
        {"alora_invocation_tokens": [5, 6]},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"modules_to_save": ["lm_head"], "lora_dropout": 0.1},
        {"target_modules": r".*\.1\..*(q|v)_proj"},
    ],
    ids=str,
)
def test_one_adapter_with_weight_1_is_copied_bit_for_bit(fields: dict[str, Any], type_: str) -> None:
    model = peftlite.get_peft_model(
        tiny("llama"), LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **fields}), "a"
    )
    scramble(model, "a")
    report = model.add_weighted_adapter(["a"], [1.0], "copy", type_, density=1.0)
    assert report.relative_error == 0
    for layer in layers(model):
        old, new = layer.tensors("a"), layer.tensors("copy")
        assert list(old) == list(new)
        assert all(torch.equal(tensor, new[suffix]) and new[suffix] is not tensor for suffix, tensor in old.items())
        assert all(layer.__dict__[number]["copy"] == layer.__dict__[number]["a"] for number in layer.tuner.numbers)
    assert model.peft_config["copy"] == model.peft_config["a"]
    assert model.peft_config["copy"] is not model.peft_config["a"]
    before, _ = logits(model, "a"), model.set_adapter("copy")
    assert torch.equal(logits(model, "copy"), before)


@torch.no_grad()
def logits(model: Any, name: str) -> Tensor:
    model.eval().set_adapter(name)
    found: Tensor = model(**batch("llama")).logits
    return found


def test_one_scaling_for_all_leaves_the_factors_as_they_are() -> None:
    model = on_kind("linear", PLAIN, {**PLAIN, "r": 2, "lora_alpha": 4})
    add_weighted_adapter(model, ["a", "b"], [1, -1], "sum", "cat")
    layer = next(layers(model))
    assert layer.scaling["sum"] == layer.scaling["a"]
    assert torch.equal(layer.lora_A["sum"].weight, torch.cat([layer.lora_A[n].weight for n in "ab"]))
    assert torch.equal(layer.lora_B["sum"].weight, torch.cat([layer.lora_B["a"].weight, -layer.lora_B["b"].weight], 1))


def test_adapters_in_half_precision_are_summed_in_fp32() -> None:
    model = on_kind("linear", PLAIN, OTHER).to(torch.bfloat16)
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum")
    add_weighted_adapter(model, ["a", "a"], [1.0, -1.0], "zero")
    layer = next(layers(model))
    assert (layer.lora_A["sum"].weight.dtype, layer.lora_A["zero"].weight.dtype) == (torch.float32, torch.bfloat16)
    assert off(delta(model, "sum"), WEIGHTS[0] * delta(model, "a") + WEIGHTS[1] * delta(model, "b")) < 1e-6
    assert delta(model, "zero").abs().max() == 0


def test_a_scaled_adapter_counts_as_scaled() -> None:
    model = on_kind("linear", PLAIN, PLAIN)
    peftlite.scale_adapter(model, "a", 0.3)
    add_weighted_adapter(model, ["a"], [1.0], "copy")
    add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "sum")
    assert off(delta(model, "copy"), delta(model, "a")) < 1e-15
    assert off(delta(model, "sum"), delta(model, "a") + delta(model, "b")) < 1e-7


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "mica"},
        {"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 2}},
        {"use_qalora": True, "qalora_group_size": 4},
    ],
    ids=str,
)
def test_variants_count_as_what_they_add(fields: dict[str, Any]) -> None:
    model = on_kind("linear", {**PLAIN, **fields}, OTHER)
    add_weighted_adapter(model, ["a", "b"], WEIGHTS, "sum")
    assert off(delta(model, "sum"), WEIGHTS[0] * delta(model, "a") + WEIGHTS[1] * delta(model, "b")) < 1e-6


def test_a_module_that_one_adapter_trains_whole_is_taken_over() -> None:
    model = peftlite.get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    scramble(model, "b")
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", "cat")
    head = model.get_base_model().lm_head
    assert model.peft_config["sum"].modules_to_save == ["lm_head"]
    assert torch.equal(head.modules_to_save["sum"].weight, head.modules_to_save["b"].weight)
    assert head.modules_to_save["sum"].weight is not head.modules_to_save["b"].weight


# ---- truncated
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_rank_gives_the_best_approximation_and_its_error(kind: str, rank: int) -> None:
    model = on_kind(kind, PLAIN, OTHER)
    report = add_weighted_adapter(model, ["a", "b"], WEIGHTS, "cut", "svd", svd_rank=rank)
    wanted = (WEIGHTS[0] * delta(model, "a") + WEIGHTS[1] * delta(model, "b")).flatten(1)
    sizes = torch.linalg.svdvals(wanted)
    best = float(sizes[rank:].norm() / sizes.norm())
    assert off(delta(model, "cut").flatten(1), wanted) == pytest.approx(best, rel=1e-5)
    assert report.relative_error == report.errors["layer"] == pytest.approx(best, rel=1e-5)
    assert report.ranks == {"layer": rank}


def test_groups_of_a_convolution_share_the_rank() -> None:
    model = on_kind("conv2d-groups", PLAIN, OTHER)
    report = add_weighted_adapter(model, ["a", "b"], WEIGHTS, "cut", "svd", svd_rank=4)
    a, b, got = outputs(model, KINDS["conv2d-groups"].feed(torch.float32), "a", "b", "cut")
    assert report.ranks == {"layer": 4}
    assert 0.5 * report.relative_error < off(got, WEIGHTS[0] * a + WEIGHTS[1] * b) < 2 * report.relative_error


def test_the_error_of_all_layers_is_that_of_one_long_vector() -> None:
    both = twins("llama", target_modules=["q_proj", "down_proj"], r=3)
    both.add("other", target_modules=["q_proj"], r=2, lora_alpha=20)
    report = both.ours.add_weighted_adapter(["default", "other"], [1, 1], "cut", svd_rank=1)
    model = both.ours
    wanted, got = [], []
    for layer in layers(copy.deepcopy(model).double()):
        parts = {n: layer.variants[n].delta(View(layer, n)).flatten() for n in layer.variants}
        wanted.append(parts["default"] + parts.get("other", 0))
        got.append(parts["cut"])
    assert report.relative_error == pytest.approx(off(torch.cat(got), torch.cat(wanted)), rel=1e-5)


# ---- entry by entry
def entries(kind: str, deltas: list[Tensor], weights: list[float], density: float, method: str) -> Tensor:
    """What the papers say, in float64 and in so many words."""
    kept = []
    for matrix in deltas:
        least = matrix.abs().flatten().sort(descending=True).values[int(density * matrix.numel()) - 1]
        kept.append(torch.where(matrix.abs() >= least, matrix, 0.0))
    if kind == "magnitude_prune":
        return sum((w * t for w, t in zip(weights, kept, strict=True)), torch.zeros_like(kept[0]))
    signed = torch.stack([t if w > 0 else -t for w, t in zip(weights, kept, strict=True)])
    sign = torch.where((signed if method == "total" else signed.sign()).sum(0) >= 0, 1.0, -1.0)
    agrees = signed.sign() == sign
    sizes = torch.tensor([abs(w) for w in weights]).double().view(-1, 1, 1)
    return (signed * sizes * agrees).sum(0) / agrees.sum(0).clamp_min(1)


@pytest.mark.parametrize("form", ["", "_svd"])
@pytest.mark.parametrize("weights", [[1.0, 0.5], [0.2, 2.0], [1.0, -0.5]], ids=str)
@pytest.mark.parametrize(("kind", "method"), [("ties", "total"), ("ties", "frequency"), ("magnitude_prune", "total")])
def test_entries_are_combined_as_the_papers_say_and_as_peft_does_on_updates(
    kind: str, method: str, weights: list[float], form: str
) -> None:
    both = twins("llama", target_modules=["layers.0.self_attn.v_proj"], r=3)
    both.add("other", target_modules=["layers.0.self_attn.v_proj"], r=2, lora_alpha=20)
    names = ["default", "other"]
    with pytest.warns(PeftliteWarning, match="svd_rank"):
        report = both.ours.add_weighted_adapter(
            names, weights, "new", kind + form, density=0.4, majority_sign_method=method
        )
    wanted = entries(kind, [delta(both.ours, name) for name in names], weights, 0.4, method)
    assert report.relative_error == 0
    assert off(delta(both.ours, "new"), wanted) < 1e-6
    if min(weights) > 0 or kind != "ties":  # PEFT elects signs as if all weights were positive
        both.theirs.add_weighted_adapter(
            names, weights, "new", f"{kind}_svd", density=0.4, majority_sign_method=method, svd_rank=8
        )
        layer = both.theirs.base_model.model.model.layers[0].self_attn.v_proj
        assert off(layer.get_delta_weight("new").double(), wanted) < 1e-5


def test_a_negative_weight_votes_for_the_opposite() -> None:
    model = on_kind("linear", PLAIN, OTHER, OTHER)
    layer = next(layers(model))
    for factor in ("lora_A", "lora_B"):
        getattr(layer, factor)["c"].weight.data.copy_(getattr(layer, factor)["b"].weight)
    layer.lora_B["c"].weight.data.neg_()
    for name, weight in (("b", -0.5), ("c", 0.5)):
        with pytest.warns(PeftliteWarning):
            add_weighted_adapter(model, ["a", name], [1.0, weight], f"with-{name}", "ties", density=0.5)
    assert torch.equal(delta(model, "with-b"), delta(model, "with-c"))


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dropped_entries_are_zero_the_others_larger_and_a_seed_repeats_them(kind: str) -> None:
    model = on_kind("linear", PLAIN)
    for name, seed in (("x", 3), ("y", 3), ("z", torch.Generator().manual_seed(4))):
        with pytest.warns(PeftliteWarning):
            add_weighted_adapter(model, ["a"], [2.0], name, kind, density=0.25, seed=seed)
    ratio = delta(model, "x") / delta(model, "a")
    kept = ratio != 0
    assert 0 < kept.sum() < kept.numel() / 2
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 8.0), rtol=1e-4, atol=0)
    assert torch.equal(delta(model, "x"), delta(model, "y"))
    assert not torch.equal(delta(model, "x"), delta(model, "z"))


def test_without_a_seed_the_global_generator_decides() -> None:
    model = on_kind("linear", PLAIN)
    for name in ("x", "y"):
        torch.manual_seed(5)
        add_weighted_adapter(model, ["a"], [1.0], name, "dare_linear", density=0.5, svd_rank=2)
    assert torch.equal(delta(model, "x"), delta(model, "y"))


# ---- PEFT
def same_update(both: Twins, tolerance: float) -> None:
    for layer in layers(both.ours):
        assert layer.tensors("new").keys() == layer.tensors("default").keys()
    ours, theirs = both.ours, both.theirs
    ours.set_adapter("new")
    theirs.set_adapter("new")
    got, wanted = both.outputs()
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("weights", [[0.7, 0.4], [1.5, -2.0]], ids=str)
@pytest.mark.parametrize("fields", [{"type_": "cat"}, {"svd_rank": 3}, {"svd_rank": 3, "svd_clamp": 0.9}], ids=str)
def test_where_peft_is_right_so_are_we(fields: dict[str, Any], weights: list[float]) -> None:
    options = {key: value for key, value in fields.items() if key != "type_"}
    both = twins("llama", target_modules=["q_proj", "v_proj"], r=3)
    both.add("other", target_modules=["v_proj"], r=3, lora_alpha=20)
    for model in (both.ours, both.theirs):
        model.add_weighted_adapter(["default", "other"], weights, "new", fields.get("type_", "svd"), **options)
    same_update(both, 2e-5)


FAULTS: dict[str, tuple[dict[str, Any], list[float], str]] = {
    "linear has cross terms": ({"r": 3}, [1.0, 1.0], "linear"),
    "svd cuts silently": ({"r": 3}, [1.0, 1.0], "svd"),
    "rsLoRA": ({"use_rslora": True}, [1.0], "cat"),
    "lora_bias": ({"lora_bias": True}, [1.0], "cat"),
    "DoRA": ({"use_dora": True}, [1.0], "cat"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_where_peft_is_wrong_we_are_not(fault: str) -> None:
    fields, weights, type_ = FAULTS[fault]
    both = twins("opt", target_modules=["q_proj", "v_proj"], **fields)
    both.add("other", target_modules=["q_proj", "v_proj"], **fields)
    names = ["default", "other"][: len(weights)]
    for model in (both.ours, both.theirs):
        model.add_weighted_adapter(names, weights, "new", type_)
    both.ours.set_adapter(names)  # both active: the sum, by definition
    wanted = both.outputs()[0]
    both.ours.set_adapter("new")
    both.theirs.set_adapter("new")
    ours, theirs = both.outputs()
    assert off(ours, wanted) < 1e-6
    assert off(theirs, wanted) > 1e-2


# ---- (IA)^3
def test_scales_of_ia3_are_summed_as_in_peft() -> None:
    fields: dict[str, Any] = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ours = peftlite.get_peft_model(tiny("llama"), IA3Config(**fields), "x")
    theirs = peft.get_peft_model(tiny("llama"), peft.IA3Config(**fields), "x")
    ours.add_adapter("y", IA3Config(**fields))
    theirs.add_adapter("y", peft.IA3Config(**fields))
    for name in "xy":
        scramble(ours, name)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model.add_weighted_adapter(["x", "y"], [0.7, -0.4], "new")
    for key, tensor in peftlite.get_peft_model_state_dict(ours, adapter_name="new").items():
        torch.testing.assert_close(tensor, theirs.state_dict()[f"{key}.new"])
    assert ours.active_adapters == ["x"]


# ---- refused
Call = Callable[[nn.Module], object]
REFUSED: dict[str, tuple[tuple[Any, ...], Call, type[Exception], str]] = {
    "unknown": (({}, {}), lambda m: add_weighted_adapter(m, ["a", "typo"], [1, 1], "n"), AdapterNameError, "typo"),
    "taken": (({}, {}), lambda m: add_weighted_adapter(m, ["a"], [1], "b"), AdapterNameError, "already"),
    "bad name": (({},), lambda m: add_weighted_adapter(m, ["a"], [1], "x.y"), AdapterNameError, r"x\.y"),
    "none": (({},), lambda m: add_weighted_adapter(m, [], [], "n"), ConfigError, "0 entries"),
    "lengths": (({}, {}), lambda m: add_weighted_adapter(m, ["a", "b"], [1], "n"), ConfigError, "2 entries"),
    "not finite": (({},), lambda m: add_weighted_adapter(m, ["a"], [float("nan")], "n"), ConfigError, "finite"),
    "type": (({},), lambda m: add_weighted_adapter(m, ["a"], [1], "n", "tiess"), ConfigError, "nearest: `ties`"),
    "density": (({},), lambda m: add_weighted_adapter(m, ["a"], [1], "n", "ties"), ConfigError, "density"),
    "density 2": (({},), lambda m: add_weighted_adapter(m, ["a"], [1], "n", "ties", density=2), ConfigError, "above 1"),
    "majority": (
        ({},),
        lambda m: add_weighted_adapter(m, ["a"], [1], "n", "ties", density=1, majority_sign_method="x"),
        ConfigError,
        "majority",
    ),
    "rank": (({},), lambda m: add_weighted_adapter(m, ["a"], [1], "n", svd_rank=0), ConfigError, "svd_rank"),
    "clamp": (({},), lambda m: add_weighted_adapter(m, ["a"], [1], "n", svd_clamp=0), ConfigError, "svd_clamp"),
    "dora": (({"use_dora": True}, {}), lambda m: add_weighted_adapter(m, ["a", "b"], [1, 1], "n"), ConfigError, "Dora"),
    "dora weight": (({"use_dora": True},), lambda m: add_weighted_adapter(m, ["a"], [2], "n"), ConfigError, "Dora"),
    "dora rank": (
        ({"use_dora": True, "r": 4},),
        lambda m: add_weighted_adapter(m, ["a"], [1], "n", svd_rank=2),
        ConfigError,
        "Dora",
    ),
    "bias": (({"bias": "all"},), lambda m: add_weighted_adapter(m, ["a"], [1], "n"), ConfigError, "bias='all'"),
    "two heads": (
        ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
        lambda m: add_weighted_adapter(m, ["a", "b"], [1, 1], "n", "cat"),
        ConfigError,
        "modules_to_save",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_and_nothing_changes(case: str) -> None:
    fields, call, error, message = REFUSED[case]
    model = on_kind("linear", *fields)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model)
    assert snapshot(model) == before


def test_other_methods_are_refused_by_name() -> None:
    model = Holder(KINDS["linear"])
    peftlite.inject_adapter_in_model(LoHaConfig(target_modules=["layer"]), model, "a")
    with pytest.raises(ConfigError, match="`LOHA`"):
        add_weighted_adapter(model, ["a"], [1.0], "n")
