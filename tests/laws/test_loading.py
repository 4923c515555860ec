"""The promises of loading: all of an adapter or nothing, never what does not fit without a word, by every way in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftlite
from peftlite.checkpoint.keys import CONFIG_NAME, PREFIX, RECORD_NAME, SAFETENSORS_WEIGHTS_NAME
from peftlite.config import config_class, config_from_dict
from peftlite.errors import CheckpointError, ConfigError, PeftliteError, PeftliteWarning
from tests.adapters import A, B, logits, rewrite, snapshot, with_adapter
from tests.models import tiny

Tensors = dict[str, Tensor]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA adapter of rank 2 on the q_proj layers of the tiny Llama."""
    peftlite.save_adapter(with_adapter(), tmp_path / "saved")
    return tmp_path / "saved"


# ---- what does not fit is one error, by every way in


def into_bare(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = tiny("llama")
    return model, lambda: peftlite.load_adapter(model, place, **how)


def into_adapted(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = with_adapter(name="mine", target_modules=["v_proj"])
    return model, lambda: peftlite.load_adapter(model, place, **how)


def into_transformers(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = tiny("llama")
    return model, lambda: model.load_adapter(str(place), **how)


def from_pretrained(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = tiny("llama")
    return model, lambda: peftlite.PeftModel.from_pretrained(model, place, **how)


def into_wrapped(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = peftlite.wrap(with_adapter(name="mine", target_modules=["v_proj"]))
    return model, lambda: model.load_adapter(place, "new", **how)


def over_its_own(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = with_adapter()
    return model, lambda: peftlite.load_adapter(model, place, **how)


def set_in_place(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = with_adapter()
    return model, lambda: peftlite.set_peft_model_state_dict(model, load_file(place / SAFETENSORS_WEIGHTS_NAME), **how)


def set_wrapped(place: Path, **how: Any) -> tuple[Any, Callable[[], Any]]:
    model = peftlite.wrap(with_adapter())
    return model, lambda: peftlite.set_peft_model_state_dict(model, load_file(place / SAFETENSORS_WEIGHTS_NAME), **how)


WAYS = [
    into_bare,
    into_adapted,
    into_transformers,
    from_pretrained,
    into_wrapped,
    over_its_own,
    set_in_place,
    set_wrapped,
]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


def without(tensors: Tensors) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != A}


MISFITS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (without, "1 tensor missing: `.*layers.0.self_attn.q_proj.lora_A.weight`.*Likely cause: "),
    "unexpected": (lambda t: t | {f"{PREFIX}model.layers.0.self_attn.q_prj.lora_A.weight": t[A]},
                   r"1 tensor unexpected: `.*q_prj.*` \(nearest: `.*q_proj.lora_A.weight`\)"),
    "shape": (lambda t: t | {A: torch.ones(2, 9)}, r"1 tensor of another shape: `.*` is \(2, 9\), not \(2, 16\)"),
    "rank": (lambda t: {k: (torch.ones(5, 16) if "lora_A" in k else torch.ones(16, 5)) for k in t},
             "4 tensors of another shape.*Likely cause: the config says rank 2 where the weights have rank 5"),
    "kind": (lambda t: t | {A: torch.ones(2, 16, dtype=torch.int64)}, "1 tensor of another kind.*int64, not float32"),
    "not finite": (lambda t: t | {A: t[A] * math.nan, B: t[B] * math.inf}, "2 tensors not finite: `.*`, `.*`"),
    "prefix": (lambda t: {f"model.{k}": v for k, v in t.items()}, "4 tensors missing.*4 tensors unexpected.*Likely "),
    "all at once": (lambda t: without(t) | {B: torch.ones(1), "x": torch.ones(1)},
                    "1 tensor missing.*1 tensor unexpected.*1 tensor of another shape"),
}  # fmt: skip


@ways
@pytest.mark.parametrize(("change", "words"), MISFITS.values(), ids=MISFITS)
def test_one_error_reports_all_that_is_wrong_and_nothing_is_changed(
    saved: Path, way: Callable[..., Any], change: Callable[[Tensors], Tensors], words: str
) -> None:
    rewrite(saved, change)
    model, load = way(saved)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=f"(?s)does not fit: .*{words}") as caught:
        load()
    assert "Nothing was changed." in str(caught.value)
    assert len(str(caught.value)) < 1200
    assert snapshot(model) == before


@pytest.mark.parametrize("way", [w for w in WAYS if w is not into_transformers], ids=lambda way: way.__name__)
def test_strict_false_gives_the_report_as_a_warning_and_a_value(saved: Path, way: Callable[..., Any]) -> None:
    rewrite(saved, MISFITS["all at once"][0])
    _, load = way(saved)
    with pytest.raises(CheckpointError) as refused:
        load()
    _, load = way(saved, strict=False)
    with pytest.warns(PeftliteWarning, match="loaded as far as it does: adapter `.*1 tensor missing") as caught:
        report = load()
    told = str(refused.value).partition("does not fit: ")[2].removesuffix(" Nothing was changed.")
    assert str(caught[0].message).endswith(told)
    assert caught[0].filename == __file__
    if way is not from_pretrained:  # which gives back the model
        assert str(report) == told
        assert report.missing_keys == [A]
        assert [misfit.key for misfit in report.mismatched_keys] == [B]


@ways
def test_what_fits_is_loaded_without_a_word(saved: Path, way: Callable[..., Any]) -> None:
    model, load = way(saved)
    load()
    peftlite.set_adapter(model, next(name for name in ("new", "default") if name in model.peft_config))
    assert torch.equal(logits(model), logits(with_adapter()))


# ---- what it was made on


def record(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / RECORD_NAME).read_text())
    return found


def test_both_shapes_record_what_an_adapter_was_made_on(tmp_path: Path) -> None:
    model = with_adapter(modules_to_save=["lm_head"])
    peftlite.save_adapter(model, tmp_path / "in place")
    model.save_pretrained(tmp_path / "transformers")
    peftlite.wrap(model).save_pretrained(tmp_path / "wrapped")
    peftlite.inject(model, peftlite.LoraConfig(target_modules=["q_proj", "v_proj"]), "other")
    peftlite.save_adapter(model, tmp_path / "more", selected_adapters=["default"])
    texts = {(tmp_path / at / RECORD_NAME).read_bytes() for at in ("in place", "transformers", "wrapped", "more")}
    assert len(texts) == 1
    assert record(tmp_path / "wrapped") | {"base_layers": 0, "tensors": 0} == {
        "architecture": "LlamaForCausalLM", "base_layers": 0, "tensors": 0, "version": 1, "vocab_size": 48,
    }  # fmt: skip


def test_peft_reads_past_the_record_without_a_word(saved: Path) -> None:
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(saved)).eval()
    torch.testing.assert_close(logits(theirs), logits(with_adapter()))


class Net(nn.Module):
    """`depth` layers from `width` numbers to 4."""

    def __init__(self, width: int, depth: int, outs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(width, outs)}) for _ in range(depth))


def ia3(**fields: Any) -> Any:
    return peftlite.IA3Config(target_modules=["lin"], feedforward_modules=[], **fields)


def layer_0() -> Any:
    return peftlite.LoraConfig(r=2, target_modules=["layers.0.lin"])


@pytest.mark.parametrize(
    ("config", "other"), [(ia3, (7, 2)), (layer_0, (5, 3))], ids=["width that no tensor shows", "depth"]
)
def test_layers_of_other_shapes_are_refused_though_the_tensors_fit(
    tmp_path: Path, config: Callable[[], Any], other: tuple[int, int]
) -> None:
    source = Net(5, 2)
    peftlite.inject(source, config())
    peftlite.save_adapter(source, tmp_path)
    peftlite.load_adapter(Net(5, 2), tmp_path)
    model = Net(*other)
    before = snapshot(model)
    for strict in (True, "shapes"):
        with pytest.raises(CheckpointError, match=r"does not fit: .*whose layers have other shapes or another number"):
            peftlite.load_adapter(model, tmp_path, strict=strict)
    assert snapshot(model) == before
    with pytest.warns(PeftliteWarning, match="other shapes"):
        report = peftlite.load_adapter(model, tmp_path, strict=False)
    assert report.other_layers
    (tmp_path / RECORD_NAME).unlink()  # as in PEFT's files
    assert peftlite.load_adapter(Net(*other), tmp_path).fits


def test_a_class_of_another_name_is_no_reason(saved: Path) -> None:
    """A head of another task, a resized vocabulary, other adapters on the same layers: nothing depends on them."""
    import transformers

    other = transformers.LlamaForSequenceClassification(tiny("llama").config)
    assert peftlite.load_adapter(other, saved).fits
    larger = tiny("llama", vocab_size=60)
    assert peftlite.load_adapter(larger, saved).fits
    assert peftlite.load_adapter(with_adapter(name="mine"), saved).fits


def test_it_is_named_as_the_cause_where_something_does_not_fit(tmp_path: Path) -> None:
    peftlite.save_adapter(with_adapter("gpt2", target_modules=["c_attn"]), tmp_path)
    with (
        pytest.warns(PeftliteWarning),
        pytest.raises(PeftliteError, match="was made on `GPT2LMHeadModel`, and this is `Ll"),
    ):
        peftlite.load_adapter(tiny("llama"), tmp_path)
    peftlite.save_adapter(with_adapter("opt", target_modules=["q_proj", "k_proj"]), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"8 tensors.*was made on `OPTForCausalLM`, and this is `LlamaForCausalLM`"
    ):
        peftlite.load_adapter(tiny("llama"), tmp_path)


def test_a_vocabulary_counts_where_something_depends_on_it(tmp_path: Path) -> None:
    for fields in ({"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}):
        peftlite.save_adapter(with_adapter(**fields), tmp_path)
        with pytest.raises(CheckpointError, match="with a vocabulary of 48 tokens, and "):
            peftlite.load_adapter(tiny("llama", vocab_size=40), tmp_path)
    peftlite.save_adapter(with_adapter(), tmp_path)
    with pytest.warns(PeftliteWarning, match=r"vocabulary of 48 tokens, and the model has 40.*resize_token_embeddings"):
        assert peftlite.load_adapter(tiny("llama", vocab_size=40), tmp_path).fits


def test_a_record_of_other_weights_is_none(tmp_path: Path) -> None:
    """Whoever saves over our files, and knows nothing of the record, is not held to it."""
    source = Net(5, 2)
    peftlite.inject(source, ia3())
    peftlite.save_adapter(source, tmp_path)
    old = (tmp_path / RECORD_NAME).read_bytes()
    rewrite(tmp_path, lambda t: {k: v.double() for k, v in t.items()})
    (tmp_path / RECORD_NAME).write_bytes(old)
    assert peftlite.load_adapter(Net(7, 2), tmp_path).fits


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1, "a": 1}', "[" * 100_000])
def test_a_damaged_record_is_said(saved: Path, text: str) -> None:
    (saved / RECORD_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=RECORD_NAME):
        peftlite.load_adapter(tiny("llama"), saved)


def test_a_record_without_its_values_is_said(saved: Path) -> None:
    (saved / RECORD_NAME).write_text(json.dumps(record(saved) | {"vocab_size": "many"}))
    with pytest.raises(CheckpointError, match=f"`{RECORD_NAME}` does not say"):
        peftlite.load_adapter(tiny("llama"), saved)


# ---- keys of configs


def is_built(kind: str) -> bool:
    try:
        return config_class(kind) is not None
    except ConfigError:
        return False


REQUIRED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "target_modules": ["q"]},
    "TRAINABLE_TOKENS": {"token_indices": [0]},
}
KINDS = [kind for kind in peft.PeftType if is_built(kind.value)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_defaults_of_peft_are_read_without_a_word(kind: Any, tmp_path: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CLASSES

    CLASSES[kind](**REQUIRED.get(kind.value, {})).save_pretrained(str(tmp_path))
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert isinstance(config_from_dict(values), config_class(kind.value))


@pytest.mark.parametrize("off", [None, False, "", [], {}])
def test_a_key_that_nobody_knows_is_ignored_with_a_warning_if_it_is_off(off: object) -> None:
    with pytest.warns(PeftliteWarning, match="`use_magic`, without effect here"):
        config_from_dict({"peft_type": "LORA", "use_magic": off})


def test_and_is_an_error_if_it_is_set(saved: Path) -> None:
    rewrite(saved, use_magic=3)
    with pytest.raises(ConfigError, match=r"sets `use_magic` to `3`.*written by PEFT `0\.21\.2`.*Nothing was changed"):
        peftlite.load_adapter(tiny("llama"), saved)


def test_an_unknown_kind_names_those_there_are(saved: Path) -> None:
    rewrite(saved, peft_type="LORRA")
    with pytest.raises(ConfigError, match=r"nearest: `LORA`.*This version has .*`IA3`"):
        peftlite.load_adapter(tiny("llama"), saved)
