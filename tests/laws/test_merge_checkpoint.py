"""`merge_checkpoint` writes what `merge_and_unload` and saving would, bit for bit, without the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import peftlite
from benchmarks.live import Live
from peftlite import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    VeraConfig,
)
from peftlite.checkpoint.shards import ShardWriter
from peftlite.errors import CheckpointError, MergeError, PeftliteError
from tests.contract.rows import scramble
from tests.models import TINY, batch, tiny
from tests.versions import VERSION, fused_experts

pytestmark = [
    pytest.mark.filterwarnings("ignore:A weight was shared:peftlite.errors.PeftliteWarning"),
    pytest.mark.filterwarnings("ignore:.*tied to the input embeddings:peftlite.errors.PeftliteWarning"),
]
INDEX = "model.safetensors.index.json"
Make = Callable[[], PeftConfig]


def lora(*names: str, **more: Any) -> Make:
    return lambda: LoraConfig(r=2, target_modules=list(names), init_lora_weights=False, **more)


CASES: dict[str, tuple[str, dict[str, Any], Make]] = {
    "lora": ("llama", {}, lora("q_proj", "down_proj", use_rslora=True)),
    "lora all-linear": ("llama", {}, lambda: LoraConfig(target_modules="all-linear", init_lora_weights=False)),
    "dora": ("llama", {}, lora("q_proj", "up_proj", use_dora=True)),
    "ia3": ("llama", {}, lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "loha": ("llama", {}, lambda: LoHaConfig(r=2, target_modules=["q_proj"])),
    "lokr": ("llama", {}, lambda: LoKrConfig(r=1, target_modules=["q_proj"])),
    "adalora": ("llama", {}, lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"])),
    "vera": ("llama", {}, lambda: VeraConfig(r=3, target_modules=["q_proj"])),
    "vera unsaved": ("llama", {}, lambda: VeraConfig(r=3, target_modules=["q_proj"], save_projection=False)),
    "embedding": ("llama", {}, lora("embed_tokens", "lm_head")),
    "tied, on the head": ("llama", {"tie_word_embeddings": True}, lora("lm_head", "q_proj")),
    "tied, on the table": ("llama", {"tie_word_embeddings": True}, lora("embed_tokens")),
    "tied, on both": ("llama", {"tie_word_embeddings": True}, lora("lm_head", "embed_tokens")),
    "tied, one adapter": ("llama", {"tie_word_embeddings": True}, lora("lm_head", ensure_weight_tying=True)),
    "whole modules": ("llama", {}, lora("q_proj", modules_to_save=["lm_head"])),
    "whole modules, tied": ("llama", {"tie_word_embeddings": True}, lora("q_proj", modules_to_save=["lm_head"])),
    "biases": ("opt", {}, lora("q_proj", "fc1", bias="lora_only")),
    "lora_bias": ("opt", {}, lora("q_proj", "fc1", lora_bias=True)),
    "dora with biases": ("opt", {}, lora("q_proj", "fc1", use_dora=True)),
    "ia3 with biases": ("opt", {}, lambda: IA3Config(target_modules=["v_proj", "fc2"], feedforward_modules=["fc2"])),
    "gpt2": ("gpt2", {}, lora("c_attn", "c_proj", fan_in_fan_out=True)),
    "gpt2, tied": ("gpt2", {}, lora("wte", "c_fc", fan_in_fan_out=True)),
    "t5": ("t5", {}, lora("q", "wo", "lm_head")),
    "t5, shared": ("t5", {}, lora("shared", "v")),
    "bert": ("bert", {}, lora("query", modules_to_save=["classifier"])),
}
every_case = pytest.mark.parametrize("case", CASES)


def checkpoint(place: Path, name: str, dtype: torch.dtype = torch.float32, *, shard: str = "5GB", **sizes: Any) -> Path:
    """A tiny model on disk, with files beside its weights."""
    model = tiny(name, dtype=dtype, **sizes)
    model.save_pretrained(place, max_shard_size=shard)
    (place / "tokenizer_config.json").write_text("{}")
    (place / "extra").mkdir()
    (place / "extra" / "notes.txt").write_text("kept")
    (place / "pytorch_model.bin").write_bytes(b"the same weights again")
    return place


def loaded(name: str, base: Path) -> Any:
    kind: Any = getattr(transformers, TINY[name].model)
    return kind.from_pretrained(base, dtype="auto").eval()


def adapter(place: Path, name: str, base: Path, config: PeftConfig) -> Path:
    """An adapter with random weights, biases and whole modules included."""
    model = loaded(name, base)
    torch.manual_seed(1)
    peftlite.inject(model, config)
    scramble(model, "default")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    peftlite.save_adapter(model, place)
    return place


def merged_in_memory(place: Path, name: str, base: Path, adapter: Path, shard: str = "5GB") -> Path:
    model = loaded(name, base)
    peftlite.load_adapter(model, adapter)
    peftlite.merge_and_unload(model).save_pretrained(place, max_shard_size=shard)
    return place


def tensors(place: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(place.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def assert_same_tensors(place: Path, other: Path) -> None:
    one, two = tensors(place), tensors(other)
    assert sorted(one) == sorted(two)
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype, name
        assert torch.equal(one[name], tensor), name


@every_case
@pytest.mark.parametrize(
    ("dtype", "shard"), [(torch.float32, "5GB"), (torch.bfloat16, "9KB")], ids=["fp32, one file", "bf16, shards"]
)
def test_it_is_what_merging_in_memory_writes(case: str, dtype: torch.dtype, shard: str, tmp_path: Path) -> None:
    name, sizes, make = CASES[case]
    if VERSION == (5, 0) and (name == "bert" or (name == "t5" and dtype is torch.bfloat16)):
        pytest.skip("transformers 5.0 saves BERT's norms under other names, and T5's `wo` in fp32")
    base = checkpoint(tmp_path / "base", name, dtype, shard=shard, **sizes)
    saved = adapter(tmp_path / "adapter", name, base, make())
    expected = merged_in_memory(tmp_path / "expected", name, base, saved, shard)
    before = tensors(base)
    out = tmp_path / "out"
    peftlite.merge_checkpoint(base, saved, out)
    assert_same_tensors(out, expected)
    assert any(key not in before or not torch.equal(tensor, before[key]) for key, tensor in tensors(out).items())
    for file in sorted(path.name for path in base.glob("*.safetensors")):  # the same shards, and those only
        assert (out / file).is_file()
        if sorted(load_file(base / file)) == sorted(load_file(out / file)) == sorted(tensors_of(expected / file)):
            assert (out / file).read_bytes() == (expected / file).read_bytes()
    again, model = loaded(name, out), loaded(name, expected)
    with torch.no_grad():
        assert torch.equal(again(**batch(name)).logits, model(**batch(name)).logits)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.is_file() else {}


def test_index_config_and_other_files(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama", shard="9KB", tie_word_embeddings=True)
    saved = adapter(tmp_path / "adapter", "llama", base, lora("lm_head")())
    out = tmp_path / "out"
    peftlite.merge_checkpoint(base, saved, out)
    old, new = (json.loads((place / INDEX).read_text()) for place in (base, out))
    assert {**old["weight_map"], "lm_head.weight": new["weight_map"]["lm_head.weight"]} == new["weight_map"]
    head = tensors(out)["lm_head.weight"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"] + head.nbytes
    assert new["metadata"]["total_parameters"] == old["metadata"]["total_parameters"] + head.numel()
    was, is_now = (json.loads((place / "config.json").read_text()) for place in (base, out))
    assert was == {**is_now, "tie_word_embeddings": True}
    assert is_now["tie_word_embeddings"] is False
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in base.iterdir()} - {"pytorch_model.bin"}
    assert (out / "extra" / "notes.txt").read_text() == "kept"
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_without_a_change_of_what_is_tied_config_and_index_are_copied(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama", shard="9KB")
    saved = adapter(tmp_path / "adapter", "llama", base, lora("q_proj")())
    peftlite.merge_checkpoint(base, saved, tmp_path / "out")
    for name in ("config.json", INDEX):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_in_memory_are_the_adapter_and_one_tensor(method: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "vocab_size": 64}
    config: PeftConfig = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj", "lm_head"], init_lora_weights=False, use_dora=method == "dora"
    )
    if method == "ia3":
        config = IA3Config(target_modules=["down_proj"], feedforward_modules=[], init_ia3_weights=False)
    base = checkpoint(tmp_path / "base", "llama", torch.bfloat16, shard="6MB", **sizes)
    saved = adapter(tmp_path / "adapter", "llama", base, config)
    before = tensors(base)
    largest = max(tensor.nbytes for tensor in before.values())
    own = sum(tensor.nbytes for tensor in tensors(saved).values())
    with Live() as live:
        peftlite.merge_checkpoint(base, saved, tmp_path / "out")
    assert sum(tensor.nbytes for tensor in before.values()) > 5 * largest
    assert live.most <= 1.1 * largest + 2 * own + 65536  # of the model's own: buffers such as the rotary frequencies


# ---- refusals, and what they leave
@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    base = checkpoint(tmp_path / "base", "llama", shard="9KB")
    return base, adapter(tmp_path / "adapter", "llama", base, lora("q_proj")()), tmp_path / "out"


def refused(error: type[PeftliteError], match: str, base: Path, saved: Path, out: Path, **more: Any) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=match):
        peftlite.merge_checkpoint(base, saved, out, **more)
    assert sorted(out.parent.rglob("*")) == before


def test_places_that_cannot_be_written_to(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, saved, out = places
    refused(CheckpointError, "`base_dir`", base, saved, base)
    refused(CheckpointError, "`base_dir`", base, saved, base / "merged")
    refused(CheckpointError, "`adapter_dir`", base, saved, saved)
    refused(CheckpointError, "around", base, saved, tmp_path)
    refused(CheckpointError, "no directory", tmp_path / "typo", saved, out)
    out.mkdir()
    (out / "mine").write_text("")
    refused(CheckpointError, "not an empty directory", base, saved, out)
    (out / "mine").unlink()
    peftlite.merge_checkpoint(base, saved, out)
    refused(CheckpointError, "not an empty directory", base, saved, out)


def test_checkpoints_that_cannot_be_merged(places: tuple[Path, Path, Path]) -> None:
    base, saved, out = places
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    refused(MergeError, "quantised", base, saved, out)
    (base / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    refused(CheckpointError, r"has the shape .*wants", base, saved, out)
    (base / "config.json").unlink()
    refused(CheckpointError, "`config.json`", base, saved, out)
    (base / "config.json").write_text(json.dumps(config))
    index = json.loads((base / INDEX).read_text())
    (base / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "more": "../../etc/passwd"}}))
    refused(CheckpointError, "no table of shards", base, saved, out)
    (base / INDEX).write_text(
        json.dumps({"weight_map": {**index["weight_map"], "more": next(iter(index["weight_map"].values()))}})
    )
    refused(CheckpointError, "disagree on 1 tensors, such as `more`", base, saved, out)
    (base / INDEX).unlink()
    refused(CheckpointError, "only safetensors", base, saved, out)


def test_missing_tensors_are_named(places: tuple[Path, Path, Path]) -> None:
    base, saved, out = places
    for path in base.glob("model*"):
        if path.suffix == ".safetensors":
            held = load_file(path)
            held.pop("model.layers.1.mlp.up_proj.weight", None)
            save_file(held, path, {"format": "pt"})
    index = json.loads((base / INDEX).read_text())
    del index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (base / INDEX).write_text(json.dumps(index))
    refused(CheckpointError, r"lacks 1 tensors.*`model.layers.1.mlp.up_proj.weight`; nearest", base, saved, out)


def test_adapters_that_cannot_be_merged(places: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, saved, out = places
    pissa = adapter(tmp_path / "pissa", "llama", base, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    refused(MergeError, "init_lora_weights", base, pissa, out)
    biased = adapter(tmp_path / "biased", "llama", base, lora("q_proj", lora_bias=True)())
    refused(MergeError, "lora_bias", base, biased, out)
    held = load_file(saved / "adapter_model.safetensors")
    key = next(key for key in held if "lora_B" in key)
    held[key][0, 0] = 3e38
    save_file(held, saved / "adapter_model.safetensors")
    peftlite.merge_checkpoint(base, saved, tmp_path / "other")
    refused(MergeError, "not finite", base, saved, out, safe_merge=True)
    del held[key]
    save_file(held, saved / "adapter_model.safetensors")
    refused(CheckpointError, "lora_B", base, saved, out)


@fused_experts
def test_experts_in_another_layout_are_refused_by_name_and_others_are_copied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    for names, parameters in ((["q_proj"], None), ([], ["experts.gate_up_proj"])):
        model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
        peftlite.inject(
            model, LoraConfig(r=2, target_modules=names, target_parameters=parameters, init_lora_weights=False)
        )
        peftlite.save_adapter(model, tmp_path / f"adapter{len(names)}")
    refused(
        MergeError, r"experts.gate_up_proj` has an adapter", tmp_path / "base", tmp_path / "adapter0", tmp_path / "out"
    )
    peftlite.merge_checkpoint(tmp_path / "base", tmp_path / "adapter1", tmp_path / "out")
    merged = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base")
    peftlite.load_adapter(merged, tmp_path / "adapter1")
    peftlite.merge_and_unload(merged).save_pretrained(tmp_path / "expected")
    assert_same_tensors(tmp_path / "out", tmp_path / "expected")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("else")])
@pytest.mark.parametrize("step", ["_write", "finish", "put"])
def test_a_failure_leaves_nothing_behind(
    step: str, error: BaseException, places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, saved, out = places
    before = sorted(out.parent.rglob("*"))

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(ShardWriter, step, fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)):
        peftlite.merge_checkpoint(base, saved, out)
    assert sorted(out.parent.rglob("*")) == before
    monkeypatch.undo()
    peftlite.merge_checkpoint(base, saved, out)


def test_a_model_of_another_class_than_the_checkpoints(tmp_path: Path) -> None:
    """A classifier trained on a causal model: its head is in the adapter, and the base's own names stay."""
    base = checkpoint(tmp_path / "base", "llama")
    kind: Any = transformers.LlamaForSequenceClassification
    model = kind.from_pretrained(base)
    model.config.pad_token_id = 0
    torch.manual_seed(0)
    peftlite.inject(
        model,
        LoraConfig(
            r=2,
            target_modules=["q_proj"],
            task_type="SEQ_CLS",
            modules_to_save=["score"],
            init_lora_weights=False,
            base_model_name_or_path=str(base),
        ),
    )
    peftlite.save_adapter(model, tmp_path / "adapter")
    peftlite.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [kind.__name__]
    merged, again = peftlite.merge_and_unload(model).state_dict(), kind.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())


@pytest.mark.parametrize("wider", [False, True], ids=["base of a larger model", "larger model than the base"])
def test_names_with_and_without_the_prefix_of_the_base_model(wider: bool, tmp_path: Path) -> None:
    """A checkpoint of the bare model for a classifier, and one of a classifier for the bare model."""
    if wider and VERSION < (5, 0):
        pytest.skip("transformers 4 does not read a bare model's names beside those of a head")
    model = tiny("bert")
    (model.bert if wider else model).save_pretrained(tmp_path / "base")
    kind: Any = transformers.BertForSequenceClassification if wider else transformers.BertModel
    torch.manual_seed(0)
    base = kind.from_pretrained(tmp_path / "base", num_labels=3) if wider else kind.from_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2,
        target_modules=["query"],
        task_type="SEQ_CLS" if wider else "FEATURE_EXTRACTION",
        modules_to_save=["classifier"] if wider else None,
        init_lora_weights=False,
    )
    if wider:
        raw = json.loads((tmp_path / "base" / "config.json").read_text())
        labels = {str(k): f"LABEL_{k}" for k in range(3)}
        (tmp_path / "base" / "config.json").write_text(
            json.dumps({**raw, "id2label": labels, "label2id": {name: int(k) for k, name in labels.items()}})
        )
    peftlite.inject(base, config)
    peftlite.save_adapter(base, tmp_path / "adapter")
    peftlite.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    old, new = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    assert set(new) - set(old) == ({"classifier.weight", "classifier.bias"} if wider else set())
    merged, again = peftlite.merge_and_unload(base).state_dict(), kind.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())


def test_tied_tensors_that_differ_on_disk_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    saved = adapter(tmp_path / "adapter", "llama", base, lora("q_proj")())
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    save_file(held, base / "model.safetensors", {"format": "pt"})
    refused(CheckpointError, r"tied by `config.json`, and differ", base, saved, tmp_path / "out")


def test_tensors_that_a_checkpoint_has_twice_or_that_no_model_has(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "llama", tie_word_embeddings=True)
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["mtp.more.weight"] = torch.arange(6.0)
    save_file(held, base / "model.safetensors", {"format": "pt", "by": "somebody"})
    saved = adapter(tmp_path / "adapter", "llama", base, lora("embed_tokens")())
    peftlite.merge_checkpoint(base, saved, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], held["lm_head.weight"])
    assert torch.equal(found["mtp.more.weight"], held["mtp.more.weight"])
    assert not torch.equal(found["model.embed_tokens.weight"], held["model.embed_tokens.weight"])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "by": "somebody"}
