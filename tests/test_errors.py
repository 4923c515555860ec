"""What bad input gets: an error that names the value and the nearest choice, and a model that is what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftlite
from peftlite import LoraConfig, LoraModel, PeftConfig, errors, get_peft_model, inject_adapter_in_model, wrap
from peftlite.core.tree import find_state, layers
from peftlite.errors import PeftliteWarning
from tests.models import tiny
from tests.snapshots import check_unchanged, snapshot
from tests.twins import fill

QV: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def plain() -> Any:
    return tiny("llama")


def half_frozen() -> Any:
    """A bare model in which somebody has frozen something already."""
    model = tiny("llama")
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.train()
    return model


def wrapped() -> Any:
    """Two adapters; the active one is merged, the other may not train."""
    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", **QV))
    model.add_adapter("other", LoraConfig(bias="all", target_modules=["k_proj"], modules_to_save=["lm_head"]))
    fill(model)
    model.set_requires_grad("other", False)
    model.merge_adapter(["default"])
    return model


def in_place() -> Any:
    model = inject_adapter_in_model(LoraConfig(**QV), tiny("llama"))
    fill(model)
    return model


def not_finite() -> Any:
    """One adapter whose last layer cannot be merged."""
    model = in_place()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.lora_B["default"].weight[0, 0] = float("inf")
    return model


def biased() -> Any:
    """An adapter with a bias that the base layer has no place for, beside one on layers that have one."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    return inject_adapter_in_model(LoraConfig(target_modules=["0", "1"], lora_bias=True), model)


@dataclass(frozen=True)
class Case:
    model: Callable[[], Any]
    call: Callable[[Any], Any]
    error: type[Exception]
    says: tuple[str, ...]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{**QV, **fields})


CASES: dict[str, Case] = {
    # ---- names of modules
    "target": Case(
        half_frozen,
        lambda m: get_peft_model(m, lora(target_modules=["q_proj", "v_prj"])),
        errors.TargetNotFoundError,
        ("`target_modules`", "`v_prj`", "LlamaForCausalLM", "nearest: `v_proj`"),
    ),
    "target-regex": Case(
        half_frozen,
        lambda m: get_peft_model(m, lora(target_modules="q_proj")),
        errors.TargetNotFoundError,
        ("`target_modules`", "`q_proj`", "regular expression", "['q_proj']"),
    ),
    "excluded-all": Case(
        plain,
        lambda m: get_peft_model(m, lora(exclude_modules=["q_proj", "v_proj"])),
        errors.TargetNotFoundError,
        ("matches no module",),
    ),
    "exclude": Case(
        plain,
        lambda m: get_peft_model(m, lora(exclude_modules=["q_prj"])),
        errors.TargetNotFoundError,
        ("`exclude_modules`", "`q_prj`", "`q_proj`"),
    ),
    "modules_to_save": Case(
        half_frozen,
        lambda m: get_peft_model(m, lora(modules_to_save=["lm_hed"])),
        errors.TargetNotFoundError,
        ("`modules_to_save`", "`lm_hed`", "nearest: `lm_head`"),
    ),
    "layers_to_transform": Case(
        plain,
        lambda m: get_peft_model(m, lora(layers_to_transform=[0, 9])),
        errors.TargetNotFoundError,
        ("`layers_to_transform`", "`9`", "nearest: `0`, `1`"),
    ),
    "rank_pattern": Case(
        plain,
        lambda m: get_peft_model(m, lora(rank_pattern={"k_proj": 2})),
        errors.TargetNotFoundError,
        ("`rank_pattern`", "`k_proj`"),
    ),
    "kind-of-layer": Case(
        half_frozen,
        lambda m: get_peft_model(m, lora(target_modules=["q_proj", "norm"])),
        errors.UnsupportedLayerError,
        ("LORA", "`model.norm`", "LlamaRMSNorm", "Linear", "`exclude_modules`"),
    ),
    "no-default-targets": Case(
        lambda: nn.Sequential(nn.Linear(2, 2)),
        lambda m: get_peft_model(m, LoraConfig()),
        errors.ConfigError,
        ("`target_modules` is None", "`all-linear`"),
    ),
    "lora_bias-on-embedding": Case(
        plain,
        lambda m: get_peft_model(m, lora(target_modules=["q_proj", "embed_tokens"], lora_bias=True)),
        errors.UnsupportedLayerError,
        ("`model.embed_tokens`", "`lora_bias`"),
    ),
    # ---- wrapping what is wrapped
    "wrap-a-wrapper": Case(
        wrapped,
        lambda m: get_peft_model(m, lora()),
        errors.StateError,
        ("`PeftModelForCausalLM`", "`add_adapter`", "`load_adapter`", "`unload`"),
    ),
    "wrap-an-inner-wrapper": Case(
        wrapped, lambda m: get_peft_model(m.base_model, lora()), errors.StateError, ("`LoraModel`", "`add_adapter`")
    ),
    "wrap-what-has-adapters": Case(
        in_place,
        lambda m: get_peft_model(m, lora(), "second"),
        errors.StateError,
        ("LlamaForCausalLM", "`default`", "`peftlite.wrap(model)`", "`load_adapter`"),
    ),
    "inner-wrapper-of-what-has-adapters": Case(
        in_place, lambda m: LoraModel(m, lora(), "second"), errors.StateError, ("`default`", "`peftlite.wrap(model)`")
    ),
    "wrap-a-bare-model": Case(plain, wrap, errors.NoAdapterError, ("LlamaForCausalLM", "`get_peft_model`")),
    # ---- configs
    "config-of-peft": Case(
        half_frozen,
        lambda m: get_peft_model(m, peft.LoraConfig(**QV)),  # type: ignore[arg-type]
        errors.ConfigError,
        ("`peft.tuners.lora.config.LoraConfig`", "`peftlite.LoraConfig`"),
    ),
    "arguments-swapped": Case(
        plain,
        lambda m: inject_adapter_in_model(m, lora()),  # type: ignore[type-var]
        errors.ConfigError,
        ("LlamaForCausalLM`", "`peftlite.LoraConfig`"),
    ),
    "arguments-of-add_adapter-swapped": Case(
        wrapped, lambda m: m.add_adapter(lora(), "x"), errors.ConfigError, ("`builtins.str`", "`peftlite.LoraConfig`")
    ),
    "config-of-no-kind": Case(
        plain, lambda m: get_peft_model(m, PeftConfig()), errors.ConfigError, ("peft_type", "nearest", "`LORA`")
    ),
    "config-of-another-kind": Case(
        wrapped,
        lambda m: m.add_adapter("x", PeftConfig(peft_type="IA3")),
        errors.ConfigError,
        ("'IA3'", "PeftModelForCausalLM", "`LORA`"),
    ),
    "inner-wrapper-of-another-kind": Case(
        half_frozen,
        lambda m: LoraModel(m, PeftConfig(peft_type="IA3"), "default"),
        errors.ConfigError,
        ("'IA3'", "LoraModel", "`LORA`"),
    ),
    "kind-that-is-not-built": Case(
        half_frozen,
        lambda m: get_peft_model(m, PeftConfig(peft_type="SHADOW")),
        errors.ConfigError,
        ("SHADOW", "`LORA`"),
    ),
    "mixed": Case(plain, lambda m: get_peft_model(m, lora(), mixed=True), errors.UnsupportedFeatureError, ("`mixed`",)),
    "second-owner-of-biases": Case(
        wrapped,
        lambda m: m.add_adapter("x", lora(bias="all")),
        errors.ConfigError,
        ("`bias='all'`", "`other`", "`bias='none'`"),
    ),
    # ---- names of adapters
    "name-taken": Case(
        wrapped,
        lambda m: m.add_adapter("other", lora()),
        errors.AdapterNameError,
        ("`other`", "another name", "`delete_adapter`"),
    ),
    "name-taken-in-place": Case(
        in_place, lambda m: inject_adapter_in_model(lora(), m), errors.AdapterNameError, ("`default`",)
    ),
    "name-with-dot": Case(plain, lambda m: get_peft_model(m, lora(), "a.b"), errors.AdapterNameError, ("`a.b`",)),
    "name-of-the-base": Case(
        plain, lambda m: get_peft_model(m, lora(), "__base__"), errors.AdapterNameError, ("`__base__`",)
    ),
    "empty-name": Case(plain, lambda m: get_peft_model(m, lora(), ""), errors.AdapterNameError, ("non-empty",)),
    **{
        f"unknown-{name}": Case(
            wrapped, call, errors.AdapterNameError, ("`defalt`", "nearest: `default`", "Nothing was changed")
        )
        for name, call in {
            "set_adapter": lambda m: m.set_adapter("defalt"),
            "set_adapter-list": lambda m: m.set_adapter(["other", "defalt"]),
            "set_requires_grad": lambda m: m.set_requires_grad(["other", "defalt"]),
            "delete_adapter": lambda m: m.delete_adapter("defalt"),
            "merge_adapter": lambda m: m.merge_adapter(["other", "defalt"]),
            "unmerge_adapter": lambda m: m.unmerge_adapter(["default", "defalt"]),
            "merge_and_unload": lambda m: m.merge_and_unload(adapter_names=["default", "defalt"]),
            "use_adapter": lambda m: m.use_adapter("defalt"),
            "scale_adapter": lambda m: m.scale_adapter("defalt", 2.0),
            "adapter_names": lambda m: m(torch.zeros(1, 1, dtype=torch.long), adapter_names=["defalt"]),
            "layer": lambda m: next(layers(m)).set_adapter(["other", "defalt"]),
        }.items()
    },
    **{
        f"name-not-a-string-{name}": Case(
            wrapped, call, errors.AdapterNameError, ("`['other']`", "Nothing was changed")
        )
        for name, call in {
            "set_adapter": lambda m: m.set_adapter(["other", ["other"]]),
            "adapter_names": lambda m: m(torch.zeros(2, 1, dtype=torch.long), adapter_names=["other", ["other"]]),
        }.items()
    },
    # ---- states
    **{
        f"bare-{call.__name__}": Case(plain, call, errors.NoAdapterError, ("LlamaForCausalLM has no adapters",))
        for call in (
            peftlite.disable_adapters,
            peftlite.enable_adapters,
            peftlite.merge_adapter,
            peftlite.unmerge_adapter,
            peftlite.merge_and_unload,
            peftlite.unload,
            peftlite.use_adapter,
            peftlite.get_layer_status,
            peftlite.active_adapters,
        )
    },
    "rows-over-merged": Case(
        wrapped,
        lambda m: m(torch.zeros(1, 1, dtype=torch.long), adapter_names=["other"]),
        errors.StateError,
        ("`default` is merged", "`unmerge_adapter`"),
    ),
    "use-over-merged": Case(
        wrapped, lambda m: m.use_adapter("other"), errors.StateError, ("`default` is merged", "`unmerge_adapter`")
    ),
    "scale-merged": Case(
        wrapped, lambda m: m.scale_adapter("default", 2.0), errors.StateError, ("`default`", "`unmerge_adapter`")
    ),
    "overlay-of-adapters": Case(
        in_place, peftlite.overlay, errors.StateError, ("LlamaForCausalLM has adapters", "`overlay`")
    ),
    # ---- merging
    "merge-not-finite": Case(
        not_finite,
        lambda m: peftlite.merge_adapter(m, safe_merge=True),
        errors.MergeError,
        ("`default`", "not finite"),
    ),
    "merge-and-unload-not-finite": Case(
        not_finite,
        lambda m: peftlite.merge_and_unload(m, safe_merge=True),
        errors.MergeError,
        ("`default`", "not finite"),
    ),
    "merge-bias": Case(biased, peftlite.merge_adapter, errors.MergeError, ("`default`", "`1`", "`lora_bias`")),
    "merge-and-unload-bias": Case(biased, peftlite.merge_and_unload, errors.MergeError, ("`default`", "`1`")),
    # ---- state dicts
    "state-dict-of-nothing": Case(
        half_frozen,
        lambda m: inject_adapter_in_model(lora(), m, state_dict={"a.weight": torch.zeros(1)}),
        errors.CheckpointError,
        ("`LORA`", "`a.weight`"),
    ),
    "state-dict-of-another-model": Case(
        half_frozen,
        lambda m: inject_adapter_in_model(lora(), m, state_dict={"layers.5.q_proj.lora_A.weight": torch.zeros(1)}),
        errors.TargetNotFoundError,
        ("`layers.5.q_proj`", "nearest"),
    ),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_error_says_what_to_do_and_changes_nothing(name: str) -> None:
    case = CASES[name]
    model = case.model()
    before = snapshot(model)
    with pytest.raises(case.error) as caught:
        case.call(model)
    assert type(caught.value) is case.error
    for words in case.says:
        assert words in str(caught.value), str(caught.value)
    assert "Nothing was changed." in str(caught.value)
    check_unchanged(model, before)
    if find_state(model) is None and isinstance(model, nn.Module) and "model" in dict(model.named_children()):
        get_peft_model(model, lora())  # and it can still be used


def test_errors_are_what_code_for_peft_catches() -> None:
    """PEFT raises ValueError for most of these."""
    for error in (errors.ConfigError, errors.TargetNotFoundError, errors.AdapterNameError, errors.CheckpointError):
        assert issubclass(error, ValueError)
    assert issubclass(errors.AdapterFilesNotFoundError, OSError)
    assert issubclass(errors.StateError, RuntimeError)


def test_a_target_list_shared_between_models_can_be_accepted() -> None:
    config = lora(target_modules=["q_proj", "query"])
    with pytest.warns(errors.PeftliteWarning, match="`query`") as caught:
        model = get_peft_model(tiny("llama"), config, unmatched="warn")
    assert len(caught) == 1
    model.add_adapter("b", config, unmatched="ignore")
    in_place = inject_adapter_in_model(config, tiny("llama"), unmatched="ignore")
    assert str(model.get_layer_status()[0].available_adapters) == "['b', 'default']"
    assert len(list(layers(model))) == len(list(layers(in_place))) == 2
    with pytest.raises(errors.ConfigError, match="`unmatched` is `never`"):
        get_peft_model(tiny("llama"), config, unmatched="never")  # type: ignore[arg-type]


def with_tied_head() -> Any:
    model = tiny("llama", tie_word_embeddings=True)
    model.add_adapter(LoraConfig(r=2, target_modules=["lm_head"]))
    return model


ADVICE: dict[str, Callable[[Path], object]] = {
    "no embeddings to save": lambda place: peftlite.save_adapter(
        inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(3, 3))),
        place,
        save_embedding_layers=True,
    ),
    "an active adapter deleted": lambda place: wrapped().delete_adapter("default"),
    "a weight untied": lambda place: with_tied_head().merge_adapter(),
    "a weight untied for good": lambda place: with_tied_head().merge_and_unload(),
    "nothing quantised": lambda place: peftlite.prepare_model_for_kbit_training(nn.Linear(2, 2)),
    "fields without effect": lambda place: peftlite.AdaLoraConfig(target_modules=["q"], total_step=9, r=16),
}


@pytest.mark.parametrize("case", ADVICE)
def test_warnings_are_about_the_line_that_called(case: str, tmp_path: Path) -> None:
    with pytest.warns(PeftliteWarning) as caught:
        ADVICE[case](tmp_path)
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name] * len(caught)
