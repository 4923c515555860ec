"""What goes wrong in PEFT 0.21.2, beside what peftlite does: the table of docs/differences.md, "Reproduced on PEFT".

Each test asserts the wrong behaviour of PEFT too, so that it tells when PEFT mends it. Nothing here is left to luck:
threads wait for each other, and work is counted, not timed.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import peftlite
from peftlite.checkpoint.keys import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peftlite.errors import CheckpointError, ConfigError, StateError, TargetNotFoundError
from tests.models import batch, tiny
from tests.test_trainer import losses, train

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT warns about is looked at where it matters

QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def config(lib: Any, **fields: Any) -> Any:
    return lib.LoraConfig(**{**QV, **fields})


def filled(model: Any, std: float = 0.3) -> Any:
    """`model`, the tensors of its adapters at random; equal in both libraries."""
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).normal_(std=std, generator=generator)
    return model


def two(lib: Any, **fields: Any) -> Any:
    """A wrapped model with adapters "a", the active one, and "b"."""
    model = lib.get_peft_model(tiny("llama"), config(lib, **fields), adapter_name="a")
    model.add_adapter("b", config(lib, **fields))
    return filled(model).eval()


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batch("llama")["input_ids"], **more).logits  # type: ignore[no-any-return]


def alone(model: Any, name: str) -> Tensor:
    model.set_adapter(name)
    return logits(model)


@contextmanager
def said() -> Iterator[list[str]]:
    """The warnings of a block."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts.extend(str(one.message) for one in caught if "is_gradient_checkpointing" not in str(one.message))


# ---- 1
def test_01_adapters_in_place_have_no_files(tmp_path: Path) -> None:
    """PEFT: the whole model is written, by keys that nothing reads, and is loaded with new random weights."""
    theirs, ours = tiny("llama"), tiny("llama")
    filled(peft.inject_adapter_in_model(config(peft), theirs))
    filled(peftlite.inject_adapter_in_model(config(peftlite), ours))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert any("base_layer" in key for key in load_file(tmp_path / "theirs" / "model.safetensors"))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    weights = [model.model.layers[0].self_attn.q_proj.weight for model in (again, tiny("llama"))]
    assert not torch.equal(*weights)
    assert not torch.allclose(logits(again), logits(theirs))
    assert torch.equal(logits(peftlite.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours")), logits(ours))


def test_01_adapter_names_are_ignored_in_place() -> None:
    for lib, heard in ((peft, False), (peftlite, True)):
        model = tiny("llama")
        lib.inject_adapter_in_model(config(lib), model, "a")
        lib.inject_adapter_in_model(config(lib), model, "b")
        filled(model)
        plain = logits(model)
        assert torch.equal(logits(model, adapter_names=["a", "__base__"]), plain) is not heard


def test_01_the_trainer_does_not_go_on_from_its_checkpoint(tmp_path: Path) -> None:
    """PEFT in place: it writes the adapter's files alone, and looks for the whole model's."""

    def fresh(lib: Any) -> Any:
        torch.manual_seed(0)
        model = tiny("llama")
        model.add_adapter(config(lib))
        return model

    best = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    best["load_best_model_at_end"] = True
    for lib, fails in ((peft, True), (peftlite, False)):
        place = tmp_path / lib.__name__
        with pytest.raises(FileNotFoundError, match="bin") if fails else nullcontext():
            train(fresh(lib), place, **best)
        checkpoint = place / "checkpoint-3"
        assert (checkpoint / SAFETENSORS_WEIGHTS_NAME).exists()
        with pytest.raises(ValueError, match="Can't find a checkpoint") if fails else nullcontext():
            resumed = train(fresh(lib), tmp_path / "resumed", resume=checkpoint)
    whole = losses(train(fresh(peftlite), tmp_path / "whole"))
    assert {step: loss for step, loss in losses(resumed).items() if step > 3} == {s: whole[s] for s in (4, 5, 6)}


# ---- 2
def meanwhile(model: Any, first: Callable[[], Tensor], second: Callable[[], object]) -> Tensor:
    """The result of `first` in a thread, while `second` runs in another between its two layers of the model."""
    inside, done = threading.Event(), threading.Event()
    owner: list[int] = []
    results: list[Tensor] = []

    def wait(*_: Any) -> None:
        if threading.get_ident() == owner[0]:
            inside.set()
            assert done.wait(60)

    def run() -> None:
        owner.append(threading.get_ident())
        results.append(first())

    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    hook = layer.register_forward_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)
    second()
    done.set()
    thread.join()
    hook.remove()
    return results[0]


def test_02_threads_get_each_others_adapters() -> None:
    theirs, ours = two(peft), two(peftlite)
    expected = {name: alone(ours, name) for name in "ab"}
    torch.testing.assert_close(alone(theirs, "a"), expected["a"])

    def use(name: str) -> Tensor:
        with peftlite.use_adapter(ours, name):
            return logits(ours)

    wrong = meanwhile(theirs, lambda: alone(theirs, "a"), lambda: theirs.set_adapter("b"))
    assert not any(torch.allclose(wrong, right, atol=1e-3) for right in expected.values())
    others: list[Tensor] = []
    assert torch.equal(meanwhile(ours, lambda: use("a"), lambda: others.append(use("b"))), expected["a"])
    assert torch.equal(others[0], expected["b"])


# ---- 3
def test_03_an_exception_leaves_hooks_behind() -> None:
    """PEFT: the rows of the failed call go on in the next one."""
    off = {}
    for lib in (peft, peftlite):
        model = two(lib)
        right = logits(model)
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1, 2], [3, 10_000]]), adapter_names=["a", "b"])
        off[lib.__name__] = [
            float((row - wanted).abs().max()) for row, wanted in zip(logits(model), right, strict=True)
        ]
    assert off["peft"][0] < 1e-5  # not 0: its rows are multiplied in groups
    assert off["peft"][1] > 0.1
    assert off["peftlite"] == [0, 0]


# ---- 4
def spoilt(place: Path, kind: str) -> Path:
    """An adapter of PEFT's whose weights are not those of its config."""
    filled(peft.get_peft_model(tiny("llama"), config(peft))).save_pretrained(place)
    path = place / SAFETENSORS_WEIGHTS_NAME
    tensors = load_file(path)
    made = {
        "prefix": {key.removeprefix("base_model.model."): t for key, t in tensors.items()},
        "half": dict(list(tensors.items())[:4]),
        "more": tensors | {key.replace("layers.1", "layers.2"): t.clone() for key, t in tensors.items()},
        "nan": {key: torch.full_like(t, float("nan")) for key, t in tensors.items()},
    }
    save_file(made[kind], path)
    return place


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("prefix", "8 tensors missing.*lack the prefix"),
        ("half", "4 tensors missing"),
        ("more", "4 tensors unexpected.*more layers"),
        ("nan", "8 tensors not finite"),
    ],
)
def test_04_what_does_not_fit_is_loaded_silently(tmp_path: Path, kind: str, words: str) -> None:
    place = spoilt(tmp_path, kind)
    theirs, ours = two(peft), two(peftlite)
    with said() as texts:
        theirs.load_adapter(str(place), "c")
    assert texts == []
    assert "c" in theirs.peft_config
    with pytest.raises(CheckpointError, match=words):
        ours.load_adapter(place, "c")
    assert list(ours.peft_config) == ["a", "b"]


def test_04_a_load_that_fails_leaves_the_adapter_registered(tmp_path: Path) -> None:
    place = spoilt(tmp_path, "half")
    tensors = load_file(place / SAFETENSORS_WEIGHTS_NAME)
    save_file({key: torch.ones(3, 3) for key in tensors}, place / SAFETENSORS_WEIGHTS_NAME)
    theirs, ours = two(peft), two(peftlite)
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs.load_adapter(str(place), "c")
    with pytest.raises(CheckpointError, match="another shape"):
        ours.load_adapter(place, "c")
    assert ("c" in theirs.peft_config, "c" in ours.peft_config) == (True, False)


# ---- 5
def test_05_a_partial_merge_drops_the_other_adapters() -> None:
    theirs, ours = two(peft), two(peftlite)
    for model in (theirs, ours):
        model.base_model.set_adapter(["a", "b"])
    right = logits(ours)
    torch.testing.assert_close(logits(theirs), right)
    theirs.merge_adapter(["a"])
    ours.merge_adapter(["a"])
    torch.testing.assert_close(logits(ours), right, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(theirs), right, atol=1e-2)
    assert theirs.active_adapters == ["a", "b"]
    theirs.unmerge_adapter()
    torch.testing.assert_close(logits(theirs), right)


# ---- 6
def test_06_tied_embeddings_are_merged_twice() -> None:
    added = {}
    for lib in (peft, peftlite):
        base = tiny("llama", tie_word_embeddings=True)
        before = base.get_input_embeddings().weight.detach().clone()
        fields = config(lib, target_modules=["embed_tokens"], ensure_weight_tying=True)
        model = lib.get_peft_model(base, fields)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.1)
        merged = model.merge_and_unload().get_input_embeddings().weight.detach()
        update = 8 / 4 * (4 * 0.1 * 0.1)  # alpha / r times a sum over r
        added[lib.__name__] = float((merged - before).mean()) / update
    assert added == pytest.approx({"peft": 2.0, "peftlite": 1.0}, abs=1e-3)


# ---- 7
def test_07_unmerging_in_bf16_is_not_the_original() -> None:
    changed = {}
    for lib in (peft, peftlite):
        model = filled(lib.get_peft_model(tiny("llama", dtype=torch.bfloat16), config(lib)), std=0.1)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        before = layer.base_layer.weight.detach().clone()
        model.merge_adapter()
        model.unmerge_adapter()
        changed[lib.__name__] = int((layer.base_layer.weight != before).sum())
    assert changed["peft"] > 0
    assert changed["peftlite"] == 0


# ---- 8
@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"use_dora": True}], ids=["rslora", "dora"])
def test_08_one_adapter_with_weight_one_is_another(fields: dict[str, Any]) -> None:
    off = {}
    for lib in (peft, peftlite):
        model = two(lib, **fields)
        right = alone(model, "a")
        model.add_weighted_adapter(["a"], [1.0], "c")
        off[lib.__name__] = float((alone(model, "c") - right).norm() / right.norm())
    assert off["peft"] > 0.01
    assert off["peftlite"] == 0


def test_08_a_sum_of_two_is_not_the_sum() -> None:
    off = {}
    for lib in (peft, peftlite):
        model = two(lib)
        model.base_model.set_adapter(["a", "b"])
        right = logits(model)
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", "linear")
        off[lib.__name__] = float((alone(model, "c") - right).norm() / right.norm())
    assert off["peft"] > 0.05
    assert off["peftlite"] < 1e-5


# ---- 9
def test_09_a_context_makes_a_frozen_adapter_train(tmp_path: Path) -> None:
    trains = {}
    filled(peft.get_peft_model(tiny("llama"), config(peft))).save_pretrained(tmp_path)
    for lib in (peft, peftlite):
        model = lib.PeftModel.from_pretrained(tiny("llama"), tmp_path)
        with model.disable_adapter():
            pass
        trains[lib.__name__] = any(parameter.requires_grad for parameter in model.parameters())
    assert trains == {"peft": True, "peftlite": False}


# ---- 13
@pytest.mark.parametrize(
    ("fields", "near"),
    [
        ({"target_modules": ["q_proj", "typo_proj"]}, "typo_proj"),
        ({"modules_to_save": ["lm_hed"]}, "lm_hed.*nearest: `lm_head`"),
        ({"layers_to_transform": [0, 9]}, "`9`.*nearest: `0`, `1`"),
    ],
)
def test_13_typos_are_accepted(fields: dict[str, Any], near: str) -> None:
    with said() as texts:
        peft.get_peft_model(tiny("llama"), config(peft, **fields))
    assert texts == []
    with pytest.raises(TargetNotFoundError, match=near):
        peftlite.get_peft_model(tiny("llama"), config(peftlite, **fields))


# ---- 14
def test_14_wrapping_twice_overwrites_the_first() -> None:
    """PEFT: the second adapter takes the place of the first in the first model too."""
    base = tiny("llama")
    first = filled(peft.get_peft_model(base, config(peft)))
    before = logits(first)
    peft.get_peft_model(base, config(peft))
    assert not torch.allclose(logits(first), before)
    base = tiny("llama")
    first = filled(peftlite.get_peft_model(base, config(peftlite)))
    before = logits(first)
    for again in (base, first):
        with pytest.raises(StateError, match="add_adapter"):
            peftlite.get_peft_model(again, config(peftlite))
    assert torch.equal(logits(first), before)


# ---- 15
@pytest.mark.parametrize("shape", ["wrapped", "in place"])
def test_15_embeddings_are_lost_after_a_resize(tmp_path: Path, shape: str) -> None:
    saved = {}
    for lib in (peft, peftlite):
        base = tiny("llama")
        base.resize_token_embeddings(60)
        model = lib.get_peft_model(base, config(lib)) if shape == "wrapped" else base
        if shape == "in place":
            base.add_adapter(config(lib))
        model.save_pretrained(tmp_path / lib.__name__)
        keys = load_file(tmp_path / lib.__name__ / SAFETENSORS_WEIGHTS_NAME)
        saved[lib.__name__] = any("embed_tokens" in key for key in keys)
    assert saved == {"peft": False, "peftlite": True}


# ---- 16
class Products(TorchDispatchMode):
    """Counts matrix products that are as large as a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "bmm") and isinstance(found, Tensor) and found.numel() >= SIZE * SIZE:
            self.products += 1
        return found


SIZE = 64


def test_16_dora_begins_with_a_product_for_every_layer() -> None:
    counts = {}
    for lib in (peft, peftlite):
        model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(5)))
        fields = config(lib, target_modules=[str(i) for i in range(5)], use_dora=True)
        with Products() as seen:
            lib.get_peft_model(model, fields)
        counts[lib.__name__] = seen.products
    assert counts["peft"] >= 5
    assert counts["peftlite"] == 0


def test_16_a_dora_adapter_is_made_before_it_is_loaded(tmp_path: Path) -> None:
    """PEFT makes an adapter, products and all, and then overwrites it with the file."""
    counts = {}
    model = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(5)))
    names = [str(i) for i in range(5)]
    peft.get_peft_model(model, config(peft, target_modules=names, use_dora=True)).save_pretrained(tmp_path)
    for lib in (peft, peftlite):
        base = nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(5)))
        with Products() as seen:
            lib.PeftModel.from_pretrained(base, tmp_path)
        counts[lib.__name__] = seen.products
    assert counts["peft"] >= 5
    assert counts["peftlite"] == 0


# ---- 17
def test_17_an_unknown_kind_is_a_bare_key_error(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORRA"}))
    with pytest.raises(KeyError, match=r"^'LORRA'$"):
        peft.PeftConfig.from_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=r"nearest: `LORA`.*This version has .*`LORA`"):
        peftlite.PeftConfig.from_pretrained(tmp_path)


def test_17_unknown_keys_are_dropped(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "use_magic": True, "peft_version": "0.99"}))
    with said() as texts:
        peft.PeftConfig.from_pretrained(str(tmp_path))
    assert "ignored" in texts[0]
    with pytest.raises(ConfigError, match=r"sets `use_magic`.*written by PEFT `0\.99`"):
        peftlite.PeftConfig.from_pretrained(tmp_path)


def test_17_the_order_of_names_in_a_config_is_that_of_a_set(tmp_path: Path) -> None:
    """PEFT: of a set of strings, which is another one in another process."""
    names = ["q_proj", "v_proj", "k_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    written = {}
    for lib in (peft, peftlite):
        mine = config(lib, target_modules=names)
        mine.save_pretrained(tmp_path / lib.__name__)
        written[lib.__name__] = json.loads((tmp_path / lib.__name__ / CONFIG_NAME).read_text())["target_modules"]
        if lib is peft:
            assert isinstance(mine.target_modules, set)
    assert set(written["peft"]) == set(names)
    assert written["peftlite"] == sorted(names)


@pytest.mark.parametrize("name", ["train", "type"])
def test_17_names_of_modules_attributes_are_no_names_for_adapters(name: str) -> None:
    with pytest.raises(KeyError, match=f"attribute '{name}' already exists"):
        peft.get_peft_model(tiny("llama"), config(peft), adapter_name=name)
    ours = peftlite.get_peft_model(tiny("llama"), config(peftlite), adapter_name=name)
    assert torch.equal(logits(ours), logits(tiny("llama")))


def test_17_the_users_config_is_changed() -> None:
    for lib, same in ((peft, False), (peftlite, True)):
        mine = config(lib, target_modules=None, modules_to_save=None)
        before = dict(mine.__dict__)
        lib.get_peft_model(tiny("llama"), mine)
        assert (mine.__dict__ == before) is same
