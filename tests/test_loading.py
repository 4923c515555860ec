"""What is loaded: all of an adapter or none of it, and never anything that does not fit without a word."""

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
from peftlite.checkpoint import targets
from peftlite.checkpoint.adapters import load_adapter, save_adapter
from peftlite.checkpoint.files import read_config, write_adapter
from peftlite.checkpoint.hub import HubOptions
from peftlite.checkpoint.keys import CONFIG_NAME, PREFIX, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peftlite.checkpoint.state_dict import get_peft_model_state_dict, set_peft_model_state_dict
from peftlite.core.layer import AdapterLayer
from peftlite.core.tree import base_model_of, find_state, named_layers
from peftlite.errors import AdapterNameError, CheckpointError, PeftliteError, PeftliteWarning, StateError
from tests.models import batch, tiny

A = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
B = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
quiet = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:Setting `save_embedding_layers`")


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a failed load must leave alone: tensors and their bits, flags, modules, adapters."""
    state = find_state(model)
    return (
        {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()},
        {name: t.detach().clone().view(torch.uint8).sum() for name, t in model.state_dict().items() if t.dim()},
        [id(module) for module in model.modules()],
        None if state is None else (sorted(state.configs), state.active, state.trainable, state.enabled),
    )


def randomised(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in named_layers(model):
            for name in layer.variants:
                for tensor in layer.tensors(name).values():
                    tensor.normal_(generator=generator)
    return model


def with_adapter(model: str = "llama", name: str = "default", **fields: Any) -> Any:
    base = tiny(model)
    peftlite.inject(base, peftlite.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields}), name)
    return randomised(base)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA adapter of rank 2 on the q_proj layers of the tiny Llama."""
    save_adapter(with_adapter(), tmp_path / "saved")
    return tmp_path / "saved"


def rewrite(directory: Path, change: Change | None = None, **config: Any) -> Path:
    """Change an adapter's tensors and fields of its config."""
    tensors = load_file(directory / SAFETENSORS_WEIGHTS_NAME)
    changed = tensors if change is None else change(tensors)
    write_adapter(directory, json.dumps(read_config(directory) | config), changed)
    return directory


def logits(model: Any, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return model(**batch(name)).logits  # type: ignore[no-any-return]


# ---- what fits


@quiet
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "opt"])
def test_an_adapter_of_peft_gives_the_same_outputs(tmp_path: Path, name: str) -> None:
    sites = {"llama": ["q_proj", "embed_tokens"], "gpt2": ["c_attn", "wte"], "bert": ["query"], "t5": ["q"]}
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    config = peft.LoraConfig(
        r=2, target_modules=sites.get(name, ["q_proj"]), task_type=task, fan_in_fan_out=name == "gpt2"
    )
    theirs = peft.get_peft_model(tiny(name), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs.eval(), name)
    base = tiny(name)
    report = load_adapter(base, tmp_path)
    torch.testing.assert_close(logits(base, name), expected)
    torch.testing.assert_close(logits(peftlite.wrap(base), name), expected)
    assert report.fits
    assert len(report.loaded_keys) == len(load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME))
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_loading_draws_no_random_numbers_and_leaves_nothing_on_the_meta_device(saved: Path) -> None:
    base = tiny("llama")
    before = torch.get_rng_state()
    load_adapter(base, saved)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(parameter.is_meta for parameter in base.parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_whether_it_may_train_is_asked_of_the_caller(saved: Path, trainable: bool) -> None:
    base = tiny("llama")
    load_adapter(base, saved, is_trainable=trainable)
    flags = {p.requires_grad for n, p in base.named_parameters() if "lora_" in n}
    assert flags == {trainable}
    assert base.peft_config["default"].inference_mode is not trainable
    assert not any(p.requires_grad for n, p in base.named_parameters() if "lora_" not in n)


def test_a_second_adapter_changes_nothing_for_the_first(saved: Path) -> None:
    base = with_adapter(target_modules=["v_proj"])
    before, flags = logits(base), {n: p.requires_grad for n, p in base.named_parameters()}
    load_adapter(base, saved, "type")
    assert torch.equal(logits(base), before)
    assert base.active_adapters() == ["default"]
    after = {n.replace("q_proj.base_layer", "q_proj"): p.requires_grad for n, p in base.named_parameters()}
    assert {n: after[n] for n in flags} == flags
    peftlite.set_adapter(base, "type")
    alone = tiny("llama")
    load_adapter(alone, saved)
    assert torch.equal(logits(base), logits(alone))


def test_from_a_sub_directory_and_from_a_pickle(tmp_path: Path) -> None:
    base = with_adapter(name="other")
    save_adapter(base, tmp_path)
    found = tiny("llama")
    load_adapter(found, tmp_path, hub=HubOptions(subfolder="other"))
    assert torch.equal(logits(found), logits(base))
    weights = tmp_path / "other" / SAFETENSORS_WEIGHTS_NAME
    torch.save(load_file(weights), tmp_path / "other" / WEIGHTS_NAME)
    weights.unlink()
    found = tiny("llama")
    load_adapter(found, tmp_path / "other")
    assert torch.equal(logits(found), logits(base))


def test_a_config_can_be_given_in_place_of_the_files(saved: Path) -> None:
    (saved / CONFIG_NAME).unlink()
    config = peftlite.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=64)
    base = tiny("llama")
    load_adapter(base, saved, config=config, is_trainable=True)
    assert base.model.layers[0].self_attn.q_proj.scaling["default"] == 32
    assert config.base_model_name_or_path is None
    assert config.inference_mode is False


@pytest.mark.parametrize(("autocast", "kept"), [(True, torch.float32), (False, torch.bfloat16)])
def test_one_dtype_rule(saved: Path, autocast: bool, kept: torch.dtype) -> None:
    base = tiny("llama", dtype=torch.bfloat16)
    load_adapter(base, saved, autocast_adapter_dtype=autocast)
    assert {p.dtype for n, p in base.named_parameters() if "lora_" in n} == {kept}


def test_adapters_can_be_kept_elsewhere_than_their_layers(saved: Path) -> None:
    base = tiny("llama").to("meta")
    load_adapter(base, saved)
    assert {p.device.type for n, p in base.named_parameters() if "lora_" in n} == {"cpu"}


def test_whole_modules_with_buffers_that_are_never_saved(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(3, 3)
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("angles", torch.arange(3.0), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lin(x) + self.angles)  # type: ignore[no-any-return]

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), Block()).eval()

    base = model()
    peftlite.inject(base, peftlite.LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    save_adapter(base, tmp_path)
    again = model()
    load_adapter(again, tmp_path)
    assert torch.equal(again(torch.ones(2, 3)), base(torch.ones(2, 3)))


def test_keys_of_other_libraries_are_mapped(saved: Path) -> None:
    rewrite(saved, renamed(lambda key: key.replace("model.layers", "decoder.blocks").replace("lora_A", "down")))
    mapping = {
        r"^model\.decoder\.": "wrong",
        r"^decoder\.blocks\.(\d+)\.(.*)\.down": r"model.layers.\1.\2.lora_A",
        "decoder.blocks": "model.layers",
    }
    base = tiny("llama")
    load_adapter(base, saved, key_mapping=mapping)
    assert torch.equal(logits(base), logits(with_adapter()))
    with pytest.raises(CheckpointError, match=r"`key_mapping` makes `.*` of both"):
        load_adapter(tiny("llama"), saved, key_mapping={r"blocks\.\d": "blocks"})


# ---- what does not fit: one error, and nothing is changed


def same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != A}


def put(**given: Tensor) -> Change:
    named = {"A": A, "B": B, "extra": f"{PREFIX}model.extra"}
    return lambda tensors: tensors | {named[key]: tensor for key, tensor in given.items()}


def renamed(change: Callable[[str], str]) -> Change:
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


def several(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return put(B=torch.ones(3), extra=torch.ones(1))(without_one(tensors))


MISFITS: dict[str, tuple[Change, dict[str, Any], str]] = {
    "without prefix": (
        renamed(lambda key: key.removeprefix(PREFIX)),
        {},
        r"4 tensors missing: `.*`, `.*`, `.*`, \.\.\.; 4 tensors unexpected.*nearest.*lack the prefix `base_model",
    ),
    "prefix twice": (renamed(lambda key: PREFIX + key), {}, "4 tensors missing.*twice"),
    "adapter's name": (
        renamed(lambda key: key.replace(".weight", ".default.weight")),
        {},
        "an adapter's name, `default`",
    ),
    "compiled": (renamed(lambda key: "_orig_mod." + key), {}, "`_orig_mod.`"),
    "empty": (lambda t: {}, {}, "4 tensors missing.*holds no tensors"),
    "half": (without_one, {}, "1 tensor missing: `.*q_proj.lora_A.weight`.*"),
    "more": (put(extra=torch.ones(2)), {}, "1 tensor unexpected: `base_model.model.model.extra`.*accounts for"),
    "more layers": (
        lambda t: t | {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
        {},
        "2 tensors unexpected.*more layers",
    ),
    "other targets": (same, {"target_modules": ["v_proj"]}, "4 tensors missing"),
    "rank": (same, {"r": 8}, "4 tensors of another shape.*the config says rank 8 where the weights have rank 2"),
    "huge rank": (same, {"r": 10**9}, "rank 1000000000 where the weights have rank 2"),
    "impossible rank": (same, {"r": 10**18}, "cannot be made"),
    "transposed": (lambda t: {k: v.T for k, v in t.items()}, {}, "of another shape.*other sizes"),
    "integers": (put(A=torch.ones(2, 16, dtype=torch.int32)), {}, "another kind of dtype: `.*` is int32, not float32"),
    "complex": (put(A=torch.ones(2, 16, dtype=torch.complex64)), {}, "is complex64, not float32"),
    "truth": (put(A=torch.ones(2, 16, dtype=torch.bool)), {}, "is bool, not float32"),
    "nan": (put(A=torch.full((2, 16), math.nan)), {}, "1 tensor not finite: `.*lora_A.weight`"),
    "infinite": (put(B=torch.full((16, 2), math.inf, dtype=torch.float8_e5m2)), {}, "1 tensor not finite"),
    "several": (
        several,
        {},
        "1 tensor missing.*1 tensor unexpected.*1 tensor of another shape",
    ),
    "unknown kind": (same, {"peft_type": "LORRA"}, "`'LORRA'`"),
    "unknown key": (same, {"use_magic": True}, "`use_magic`"),
    "no target": (same, {"target_modules": ["nothing"]}, "matches no module"),
}


@pytest.mark.filterwarnings("ignore:`target_modules` has `nothing`")
@pytest.mark.parametrize("first", [True, False], ids=["bare", "adapted"])
@pytest.mark.parametrize(("change", "config", "words"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_said_and_changes_nothing(
    saved: Path, change: Change, config: dict[str, Any], words: str, first: bool
) -> None:
    rewrite(saved, change, **config)
    model = tiny("llama") if first else with_adapter(name="mine", target_modules=["v_proj"])
    before = snapshot(model)
    with pytest.raises(PeftliteError, match=f"(?s){words}") as caught:
        load_adapter(model, saved)
    assert "Nothing was changed." in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert snapshot(model) == before
    save_adapter(with_adapter(), saved)
    load_adapter(model, saved)  # and can be loaded once it is mended


def test_values_that_a_smaller_dtype_cannot_hold_are_not_finite(saved: Path) -> None:
    rewrite(saved, put(A=torch.full((2, 16), 1e6)))
    load_adapter(tiny("llama", dtype=torch.float16), saved)
    with pytest.raises(CheckpointError, match="not finite"):
        load_adapter(tiny("llama", dtype=torch.float16), saved, autocast_adapter_dtype=False)


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    save_adapter(with_adapter("gpt2", target_modules=["c_attn"]), tmp_path)
    model = tiny("llama")
    before = snapshot(model)
    with pytest.warns(PeftliteWarning, match="c_attn"), pytest.raises(PeftliteError, match="c_attn"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    wider = tiny("llama", hidden_size=32)
    save_adapter(with_adapter(), tmp_path)
    with pytest.raises(CheckpointError, match="made on a model of other sizes"):
        load_adapter(wider, tmp_path)


@pytest.mark.parametrize("name", ["a.b", "", "../up", "__base__", "mine"])
def test_a_name_that_cannot_be_is_refused_before_anything_is_read(saved: Path, name: str) -> None:
    model = with_adapter(name="other")
    if name == "mine":
        (saved / CONFIG_NAME).write_text("[]")
    with pytest.raises(CheckpointError if name == "mine" else AdapterNameError):
        load_adapter(model, saved, name)


def test_asked_to_be_tolerant_it_says_what_it_left_out(saved: Path) -> None:
    rewrite(saved, several)
    base = tiny("llama")
    with pytest.warns(PeftliteWarning, match="loaded as far as it does.*1 tensor missing") as caught:
        report = load_adapter(base, saved, strict=False)
    assert caught[0].filename == __file__
    assert report.missing_keys == [A]
    assert report.unexpected_keys == [f"{PREFIX}model.extra"]
    assert [misfit.key for misfit in report.mismatched_keys] == [B]
    assert len(report.loaded_keys) == 2
    assert not report.fits
    assert not any(parameter.is_meta for parameter in base.parameters())
    first, second = (layer.self_attn.q_proj for layer in base.model.layers)
    assert first.lora_A["default"].weight.abs().sum() > 0  # fresh, as for a new adapter
    assert second.lora_B["default"].weight.abs().sum() == 0
    loaded = load_file(saved / SAFETENSORS_WEIGHTS_NAME)
    assert torch.equal(second.lora_A["default"].weight, loaded[A.replace("layers.0", "layers.1")])


def test_asked_to_be_tolerant_it_loads_values_that_are_not_finite(saved: Path) -> None:
    rewrite(saved, put(A=torch.full((2, 16), math.nan)))
    with pytest.warns(PeftliteWarning, match="1 tensor not finite"):
        report = load_adapter(tiny("llama"), saved, strict=False)
    assert report.not_finite_keys == [A]


@pytest.mark.parametrize("name", ["commit", "take"])
@pytest.mark.parametrize("first", [True, False], ids=["bare", "adapted"])
def test_an_interrupted_load_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, name: str
) -> None:
    save_adapter(with_adapter("gpt2", target_modules=["c_attn"], bias="all"), tmp_path)
    rewrite(tmp_path, lambda t: {k: v + 1 if "bias" in k else v for k, v in t.items()})
    model = tiny("gpt2") if first else with_adapter("gpt2", name="mine", target_modules=["c_proj"])
    before = snapshot(model)
    if name == "commit":  # while layers are attached
        real, calls = AdapterLayer.add, []

        def add(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(*args)

        monkeypatch.setattr(AdapterLayer, "add", add)
    else:  # while biases of the base model are overwritten
        real_copy, copies = targets._copy, []

        def copy(tensor: Tensor, new: Tensor) -> None:
            copies.append(tensor)
            if len(copies) == 3:
                raise KeyboardInterrupt
            real_copy(tensor, new)

        monkeypatch.setattr(targets, "_copy", copy)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tmp_path)
    monkeypatch.undo()
    assert snapshot(model) == before
    load_adapter(model, tmp_path)


# ---- into an adapter that is there


def test_an_adapter_that_is_there_is_overwritten_in_place(saved: Path) -> None:
    model = with_adapter()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    with torch.no_grad():
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.zero_()
    load_adapter(model, saved, is_trainable=True)
    assert {id(p) for p in model.parameters() if p.requires_grad} == held
    assert torch.equal(logits(model), logits(with_adapter()))


def test_other_settings_of_an_adapter_that_is_there_are_refused(saved: Path) -> None:
    rewrite(saved, lora_alpha=99)
    model = with_adapter()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"other settings.*\"scaling\": \[4.0, 49.5\]"):
        load_adapter(model, saved)
    assert snapshot(model) == before


def test_a_merged_adapter_is_not_loaded_into(saved: Path) -> None:
    model = with_adapter()
    peftlite.merge_adapter(model)
    with pytest.raises(StateError, match="unmerge_adapter"):
        load_adapter(model, saved)
    with pytest.raises(StateError, match="unmerge_adapter"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(model))


# ---- tensors of the base model


def test_embeddings_in_the_file_replace_the_models(tmp_path: Path) -> None:
    source = with_adapter(target_modules=["embed_tokens"])
    with torch.no_grad():
        source.model.embed_tokens.base_layer.weight.mul_(2)
    save_adapter(source, tmp_path)
    model = tiny("llama")
    load_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(source))

    shared = peftlite.overlay(tiny("llama"))
    before = snapshot(shared)
    with pytest.raises(StateError, match="overlay"):
        load_adapter(shared, tmp_path)
    assert snapshot(shared) == before

    merged = with_adapter(target_modules=["embed_tokens"], name="mine")
    peftlite.merge_adapter(merged)
    before = snapshot(merged)
    with pytest.raises(StateError, match="unmerge_adapter"):
        load_adapter(merged, tmp_path)
    assert snapshot(merged) == before


def test_embeddings_that_are_the_same_are_not_written(tmp_path: Path) -> None:
    save_adapter(with_adapter(target_modules=["embed_tokens"]), tmp_path)
    shared = peftlite.overlay(tiny("llama"))
    versions = {name: p._version for name, p in shared.named_parameters()}
    load_adapter(shared, tmp_path)
    after = {name.replace("base_layer.", ""): p._version for name, p in shared.named_parameters()}
    assert {name: after[name] for name in versions} == versions
    merged = with_adapter(target_modules=["embed_tokens"], name="mine")
    peftlite.merge_adapter(merged)
    load_adapter(merged, tmp_path)


# ---- from a state dict in memory


@pytest.mark.parametrize("shape", ["wrapped", "in place", "inner"])
def test_what_get_gives_set_takes(shape: str) -> None:
    def shaped() -> Any:
        base = with_adapter(modules_to_save=["lm_head"], bias="all")
        return (
            base
            if shape == "in place"
            else peftlite.wrap(base)
            if shape == "wrapped"
            else peftlite.wrap(base).base_model
        )

    source, model = randomised(shaped(), seed=7), shaped()
    report = set_peft_model_state_dict(model, get_peft_model_state_dict(source))
    assert report.fits
    assert torch.equal(logits(model), logits(source))
    file_keys = {PREFIX + k: v for k, v in get_peft_model_state_dict(base_model_of(source)).items()}
    assert set_peft_model_state_dict(model, file_keys).fits


def test_a_wrapped_model_does_not_guess_at_a_missing_prefix() -> None:
    model = peftlite.wrap(with_adapter())
    with pytest.raises(CheckpointError, match="lack the prefix"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(model.unwrap()))


def test_sizes_that_do_not_match_can_be_ignored() -> None:
    model = with_adapter()
    given = get_peft_model_state_dict(model)
    key = next(iter(given))
    given[key] = torch.ones(3, 3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="of another shape"):
        set_peft_model_state_dict(model, given)
    with pytest.warns(PeftliteWarning, match="1 tensor of another shape"):
        report = set_peft_model_state_dict(model, given, ignore_mismatched_sizes=True)
    assert [misfit.key for misfit in report.mismatched_keys] == [PREFIX + key]
    assert snapshot(model) == before
    del given[next(k for k in given if k != key)]
    with pytest.raises(CheckpointError, match="1 tensor missing"):
        set_peft_model_state_dict(model, given, ignore_mismatched_sizes=True)


def test_an_adapter_without_memory_gets_it() -> None:
    model = tiny("llama")
    peftlite.inject(model, peftlite.LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    given = get_peft_model_state_dict(with_adapter())
    set_peft_model_state_dict(model, given, low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(with_adapter()))
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    given[next(iter(given))].zero_()  # the model has tensors of its own
    assert torch.equal(logits(model), logits(with_adapter()))


def test_a_report_reads_well(saved: Path) -> None:
    assert str(load_adapter(tiny("llama"), saved)) == "adapter `default`: all 4 tensors loaded"


# ---- adapters on parameters that modules read themselves


@pytest.mark.parametrize("existing", [False, True])
def test_keys_of_layers_inside_layers(tmp_path: Path, existing: bool) -> None:
    """The keys that loading expects before it attaches anything are those of the model afterwards."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        made = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "lin": nn.Linear(4, 4)})
        if existing:
            peftlite.inject(made, peftlite.LoraConfig(r=1, target_modules=["lin", "attn"]), "first")
        return made

    source = model()
    peftlite.inject(source, peftlite.LoraConfig(r=2, target_modules=["attn"], target_parameters=["lin.weight"]), "new")
    randomised(source)
    save_adapter(source, tmp_path, selected_adapters=["new"])
    again = model()
    load_adapter(again, tmp_path / "new", "new")
    found, expected = (get_peft_model_state_dict(m, adapter_name="new") for m in (again, source))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
