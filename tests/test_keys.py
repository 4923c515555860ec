"""File keys <-> places in a model: both ways without loss, and a likely cause when they do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftlite.checkpoint import keys

SLOTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
SUFFIXES = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "weight", "bias")

part = st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=12)
path = st.lists(part, max_size=6).map(".".join)
name = part.filter(lambda p: p not in SLOTS and p != keys.MODULES_TO_SAVE)


def expected(layers: int = 2, modules: tuple[str, ...] = ("q_proj", "v_proj"), head: str = "model.") -> list[str]:
    return [
        keys.file_key(f"{head}layers.{i}.self_attn.{module}", f"{slot}.weight")
        for i in range(layers)
        for module in modules
        for slot in ("lora_A", "lora_B")
    ]


@given(path, st.sampled_from(SUFFIXES))
def test_a_file_key_splits_into_what_it_was_made_of(at: str, suffix: str) -> None:
    split = keys.split_file_key(keys.file_key(at, suffix), SUFFIXES)
    assert split is not None
    assert keys.file_key(*split) == keys.file_key(at, suffix)
    if not any(at.endswith(("." + s.rpartition(".")[0], s.rpartition(".")[0])) for s in SUFFIXES if "." in s):
        assert split == (at, suffix)


@given(path, name, st.sampled_from(SLOTS), st.sampled_from(["", ".weight", ".bias"]))
def test_the_adapters_name_goes_and_comes_back(at: str, adapter: str, slot: str, leaf: str) -> None:
    live = f"{at}.{slot}.{adapter}{leaf}" if at else f"{slot}.{adapter}{leaf}"
    bare = keys.strip_adapter(live, adapter, SLOTS)
    assert bare is not None
    assert adapter in SLOTS or f".{adapter}." not in bare[len(at) :]
    assert keys.add_adapter(bare, adapter, SLOTS) == live
    assert keys.strip_adapter(live, adapter + "x", SLOTS) is None


@pytest.mark.parametrize(
    ("live", "bare"),
    [
        ("model.q.lora_A.default.weight", "model.q.lora_A.weight"),
        ("base_model.model.model.q.lora_B.default.bias", "base_model.model.model.q.lora_B.bias"),
        ("model.embed_tokens.lora_embedding_A.default", "model.embed_tokens.lora_embedding_A"),
        ("lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("mlp.modules_to_save.default.gate.weight", "mlp.gate.weight"),
        ("model.lora_A.q.lora_A.default.weight", "model.lora_A.q.lora_A.weight"),
        ("model.q.lora_A.other.weight", None),
        ("model.q.lora_A.default_2.weight", None),
        ("model.default.q.base_layer.weight", None),
        ("lm_head.original_module.weight", None),
    ],
)
def test_keys_of_a_live_model(live: str, bare: str | None) -> None:
    assert keys.strip_adapter(live, "default", SLOTS) == bare


def test_an_adapter_named_like_a_tensor() -> None:
    assert keys.strip_adapter("q.lora_A.weight.weight", "weight", SLOTS) == "q.lora_A.weight"
    assert keys.add_adapter("q.lora_A.weight", "weight", SLOTS) == "q.lora_A.weight.weight"
    assert keys.add_adapter("lm_head.weight", "default", SLOTS) is None


@given(path, st.sampled_from(SUFFIXES))
def test_prefix_goes_on_once(at: str, suffix: str) -> None:
    key = keys.file_key(at, suffix)
    assert keys.with_prefix(key) == key
    assert keys.with_prefix(keys.without_prefix(key)) in {key, keys.without_prefix(key)}


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        ("_orig_mod.model.q.weight", "model.q.weight"),
        ("module.module.model.q.weight", "model.q.weight"),
        ("model._fsdp_wrapped_module.q._checkpoint_wrapped_module.weight", "model.q.weight"),
        ("module", "module"),
        ("model.module.q", "model.module.q"),
    ],
)
def test_what_wrappers_add_goes(wrapped: str, plain: str) -> None:
    assert keys.unwrapped(wrapped) == plain


@given(st.text(max_size=2000))
def test_a_hostile_key_is_shown_on_one_short_line(key: str) -> None:
    text = keys.shown(key)
    assert text.startswith("`")
    assert text.endswith("`")
    assert text.count("`") == 2
    assert len(text) < 200
    assert text.isprintable()
    text.encode("utf-8")


def test_nearest_key_is_the_one_of_the_same_layer() -> None:
    wanted = expected(40)
    typo = wanted[60].replace("q_proj", "q_porj").replace("v_proj", "v_porj")
    assert keys.nearest_keys(typo, wanted) == [wanted[60]]
    assert keys.nearest_keys("nothing", wanted) == []
    assert keys.nearest_keys(wanted[3], []) == []


def test_nearest_key_of_very_many_stays_quick() -> None:
    wanted = expected(5000)
    assert keys.nearest_keys("x." * 100_000, wanted) == []
    assert len(keys.nearest_keys("base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight", wanted, n=3)) == 3


def _cause(found: list[str], of: list[str] | None = None) -> str:
    cause = keys.diagnose(expected() if of is None else of, found, SLOTS)
    assert cause is not None
    return cause.text


def test_a_file_that_fits_has_no_cause() -> None:
    assert keys.diagnose(expected(), expected(), SLOTS) is None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (keys.without_prefix, "lack the prefix `base_model.model.`"),
        (lambda k: keys.PREFIX + k, "prefix `base_model.model.` twice"),
        (lambda k: k.replace(keys.PREFIX, "base_model."), "begin with `base_model.` instead of"),
        (lambda k: "module." + k, "contain `module.`"),
        (lambda k: "_orig_mod." + k, "contain `_orig_mod.`"),
        (lambda k: k.replace("self_attn", "self_attn._orig_mod"), "contain `_orig_mod.`"),
        (lambda k: k.replace(".weight", ".default.weight"), "contain an adapter's name, `default`"),
        (lambda k: keys.without_prefix(k).replace(".weight", ".mine.weight"), "contain an adapter's name, `mine`"),
        (lambda k: k.replace("model.layers", "layers").replace("base_layers", "base_model.model.layers"), "begin with"),
        (lambda k: k.replace("base_model.model.model.", "base_model.model.decoder."), "`base_model.model.decoder."),
    ],
)
def test_the_cause_is_named_and_mends_every_key(spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    cause = keys.diagnose(expected(), [spoil(k) for k in expected()], SLOTS)
    assert cause is not None
    assert words in cause.text
    assert cause.mend is not None
    assert [cause.mend(spoil(k)) for k in expected()] == expected()


def test_causes_that_no_rewriting_mends() -> None:
    assert "more layers (the file has an index 3, this adapter's layers end at 1)" in _cause(expected(4))
    assert "fewer layers" in _cause(expected(1))
    assert "no tensors" in _cause([])
    assert "not saved completely" in _cause([k for k in expected() if "q_proj" in k])
    assert "more than its config accounts for" in _cause([*expected(), "base_model.model.lm_head.weight"])
    gpt2 = ["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"]
    assert "another architecture or with other targets" in _cause(gpt2)
    assert "`c_attn`" in _cause(gpt2)


def test_one_strange_key_does_not_hide_the_cause_of_the_others() -> None:
    found = [keys.without_prefix(k) for k in expected()]
    assert "lack the prefix" in _cause([*found, "optimizer_step"])


@given(st.lists(st.text(max_size=40), max_size=8), st.lists(st.text(max_size=40), max_size=8))
def test_any_two_sets_of_keys_are_diagnosed_without_a_crash(a: list[str], b: list[str]) -> None:
    cause = keys.diagnose(a, b, SLOTS)
    if cause is not None:
        assert cause.text.isprintable()
