"""Adapters whose tensors lie in a private map of their file: equal to copies, and nothing ever gets into the file."""

from __future__ import annotations

import copy
import errno
import gc
import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftlite
from peftlite.checkpoint.adapters import load_adapter, save_adapter
from peftlite.checkpoint.files import read_adapter, write_adapter
from peftlite.checkpoint.keys import RECORD_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peftlite.errors import CheckpointError, ConfigError, PeftliteWarning
from tests.adapters import A, bytes_of, logits, rewrite, snapshot, with_adapter
from tests.models import batch, tiny

MAPS = Path("/proc/self/maps")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA adapter of rank 2 on the q_proj layers of the tiny Llama."""
    save_adapter(with_adapter(), tmp_path / "saved")
    return tmp_path / "saved"


def on_function(place: Path, **options: Any) -> nn.Module:
    model = tiny("llama")
    load_adapter(model, place, is_trainable=True, **options)
    return model


def on_wrapper(place: Path, **options: Any) -> nn.Module:
    return peftlite.PeftModel.from_pretrained(tiny("llama"), place, is_trainable=True, **options)


def on_second(place: Path, **options: Any) -> nn.Module:
    model = peftlite.get_peft_model(tiny("llama"), peftlite.LoraConfig(r=2, target_modules=["q_proj"]), "first")
    model.load_adapter(place, "default", is_trainable=True, **options)
    model.set_adapter("default")
    model.delete_adapter("first")
    return model


def in_place(place: Path, **options: Any) -> nn.Module:
    model = tiny("llama")
    model.load_adapter(str(place), is_trainable=True, **options)
    return model


CALLS = [on_function, on_wrapper, on_second, in_place]


def of_adapter(model: nn.Module) -> list[Tensor]:
    return [tensor for name, tensor in model.named_parameters() if "lora_" in name]


def values(model: nn.Module) -> list[bytes]:
    return [bytes_of(tensor) for tensor in of_adapter(model)]


def maps_of(place: Path) -> list[range]:
    """The addresses at which an adapter's weights are mapped, all of them privately."""
    if not MAPS.exists():
        pytest.skip("what is mapped is not known here")
    found = [line.split(maxsplit=5) for line in MAPS.read_text().splitlines()]
    mine = [line for line in found if line[5:] and line[5].startswith(str(place / SAFETENSORS_WEIGHTS_NAME))]
    assert all(line[1] == "rw-p" for line in mine)
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in mine]


def is_mapped(tensor: Tensor, place: Path) -> bool:
    return any(tensor.data_ptr() in addresses for addresses in maps_of(place))


# ---- what is mapped


@pytest.mark.parametrize("call", CALLS)
def test_a_mapped_adapter_has_every_bit_of_a_copied_one(saved: Path, call: Callable[..., nn.Module]) -> None:
    mapped, copied = call(saved, mmap=True), call(saved)
    assert values(mapped) == values(copied) != []
    torch.testing.assert_close(logits(mapped), logits(copied))
    assert all(type(tensor) is nn.Parameter and not tensor._is_view() for tensor in of_adapter(mapped))


@pytest.mark.parametrize("call", CALLS)
def test_tensors_lie_in_the_map_and_each_has_a_storage_of_its_own(saved: Path, call: Callable[..., nn.Module]) -> None:
    tensors = of_adapter(call(saved, mmap=True))
    assert all(is_mapped(tensor, saved) for tensor in tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    assert not any(is_mapped(tensor, saved) for tensor in of_adapter(call(saved)))


def test_the_map_lives_as_long_as_its_tensors(saved: Path) -> None:
    model = on_function(saved, mmap=True)
    kept = of_adapter(model)[0]
    assert maps_of(saved)
    del model
    gc.collect()
    assert is_mapped(kept, saved)
    del kept
    assert not maps_of(saved)


def test_tensors_of_every_dtype_and_empty_ones_can_be_mapped(tmp_path: Path) -> None:
    dtypes = [torch.complex64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool]
    tensors = {f"t{i}": torch.arange(6).view(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"none": torch.empty(0, 3), "one": torch.tensor(1.5), "wide": torch.arange(12.0).view(3, 4).t()}
    write_adapter(tmp_path, "{}", tensors)
    with read_adapter(tmp_path, mmap=True) as files:
        read = {key: files.tensors.read(key) for key in files.tensors.infos}
    for key, tensor in tensors.items():
        assert (read[key].dtype, read[key].shape) == (tensor.dtype, tensor.shape)
        assert read[key].is_contiguous()
        assert bytes_of(read[key]) == bytes_of(tensor)
        assert is_mapped(read[key], tmp_path) or not tensor.numel()


# ---- what is done with it


def train(model: Any) -> None:
    optimiser = torch.optim.AdamW(of_adapter(model), lr=0.1)
    model.train()(**batch("llama")).logits.square().sum().backward()
    optimiser.step()


@torch.no_grad()
def fill(model: Any) -> None:
    for tensor in of_adapter(model):
        tensor.fill_(3.0)


def write_data(model: Any) -> None:
    for tensor in of_adapter(model):
        tensor.data[:] = 4.0


def overwrite(model: Any) -> None:
    given = {key: tensor + 1 for key, tensor in peftlite.get_peft_model_state_dict(model).items()}
    peftlite.set_peft_model_state_dict(model, given)


@pytest.mark.parametrize("change", [train, fill, write_data, overwrite])
def test_what_changes_the_tensors_does_not_change_the_file_or_others(
    saved: Path, change: Callable[[Any], None]
) -> None:
    before = (saved / SAFETENSORS_WEIGHTS_NAME).read_bytes()
    model, other, copied = on_wrapper(saved, mmap=True), on_wrapper(saved, mmap=True), on_wrapper(saved)
    unchanged = values(other)
    change(model)
    change(copied)
    for one, same in zip(of_adapter(model), of_adapter(copied), strict=True):
        torch.testing.assert_close(one, same)
    assert all(one != same for one, same in zip(values(model), unchanged, strict=True))
    assert values(other) == unchanged
    assert (saved / SAFETENSORS_WEIGHTS_NAME).read_bytes() == before


def test_saving_over_the_mapped_file_leaves_the_model_as_it_is(saved: Path) -> None:
    model, other = on_wrapper(saved, mmap=True), on_wrapper(saved, mmap=True)
    untouched = values(other)
    train(model)
    trained = values(model)
    model.save_pretrained(saved)
    assert values(model) == trained == values(on_wrapper(saved)) == values(on_wrapper(saved, mmap=True))
    assert values(other) == untouched
    assert is_mapped(of_adapter(other)[0], saved)  # the file that was
    other.save_pretrained(saved)
    assert values(on_wrapper(saved, mmap=True)) == untouched


@pytest.mark.parametrize("made", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_model_have_memory_of_their_own(saved: Path, made: Callable[[nn.Module], nn.Module]) -> None:
    model = on_function(saved, mmap=True)
    another = made(model)
    assert values(another) == values(model)
    assert not any(is_mapped(tensor, saved) for tensor in of_adapter(another))
    fill(another)
    assert values(another) != values(model)


def test_the_model_can_be_moved_merged_swapped_and_shared(saved: Path, tmp_path: Path) -> None:
    model, copied = on_wrapper(saved, mmap=True), on_wrapper(saved)
    before, plain = (saved / SAFETENSORS_WEIGHTS_NAME).read_bytes(), logits(model.eval())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), plain)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=0)
    save_adapter(with_adapter(alpha_pattern={}), tmp_path / "same")
    peftlite.hotswap_adapter(model, tmp_path / "same", "default")
    peftlite.hotswap_adapter(model, saved, "default")  # the file itself, into its map
    assert values(model) == values(copied)
    assert values(model.share_memory()) == values(copied)
    assert values(model.to(torch.bfloat16)) == values(copied.to(torch.bfloat16))
    assert (saved / SAFETENSORS_WEIGHTS_NAME).read_bytes() == before


def test_an_adapter_of_that_name_is_written_in_place(saved: Path) -> None:
    model = with_adapter()
    places = [tensor.data_ptr() for tensor in of_adapter(model)]
    fill(model)
    load_adapter(model, saved, mmap=True)
    assert [tensor.data_ptr() for tensor in of_adapter(model)] == places
    assert values(model) == values(on_function(saved))
    assert not maps_of(saved)


# ---- what is copied


@pytest.mark.parametrize(("of_file", "options"), [(None, {"autocast_adapter_dtype": False}), (torch.bfloat16, {})])
def test_what_needs_another_dtype_is_copied(saved: Path, of_file: torch.dtype | None, options: Any) -> None:
    if of_file is not None:
        rewrite(saved, lambda tensors: {key: tensor.to(of_file) for key, tensor in tensors.items()})
    mapped, copied = tiny("llama").bfloat16(), tiny("llama").bfloat16()
    load_adapter(mapped, saved, mmap=True, **options)
    load_adapter(copied, saved, **options)
    assert values(mapped) == values(copied)
    assert {tensor.dtype for tensor in of_adapter(mapped)} == {torch.float32 if of_file else torch.bfloat16}
    assert not maps_of(saved)


def test_tensors_that_are_not_aligned_are_copied_with_a_warning(saved: Path) -> None:
    expected = values(on_function(saved))
    path = saved / SAFETENSORS_WEIGHTS_NAME
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    (saved / RECORD_NAME).unlink()
    with pytest.warns(PeftliteWarning, match=r"4 of its 4 tensors .* copied"):
        model = on_function(saved, mmap=True)
    assert values(model) == expected
    assert not maps_of(saved)


def test_a_pickle_is_copied_with_a_warning(saved: Path) -> None:
    expected = values(on_function(saved))
    torch.save(load_file(saved / SAFETENSORS_WEIGHTS_NAME), saved / WEIGHTS_NAME)
    (saved / SAFETENSORS_WEIGHTS_NAME).unlink()
    with pytest.warns(PeftliteWarning, match="cannot be mapped, and is copied"):
        assert values(on_function(saved, mmap=True)) == expected


def test_what_the_file_system_cannot_map_is_copied_with_a_warning(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **options: Any) -> NoReturn:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.warns(PeftliteWarning, match=r"`.*safetensors` cannot be mapped \(No such device\)"):
        model = on_function(saved, mmap=True)
    assert values(model) == values(on_function(saved))


# ---- what is refused


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(saved: Path, number: float) -> None:
    rewrite(saved, lambda tensors: tensors | {A: torch.full_like(tensors[A], number)})
    base = tiny("llama")
    before = snapshot(base)
    with pytest.raises(CheckpointError, match="finite"):
        load_adapter(base, saved, mmap=True)
    assert snapshot(base) == before
    gc.collect()
    assert not maps_of(saved)


def test_a_file_that_is_cut_off_is_refused_before_it_is_mapped(saved: Path) -> None:
    path = saved / SAFETENSORS_WEIGHTS_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    base = tiny("llama")
    before = snapshot(base)
    with pytest.raises(CheckpointError, match="accounts for"):
        load_adapter(base, saved, mmap=True)
    assert snapshot(base) == before
    path.write_bytes(whole)
    with read_adapter(saved) as files:
        path.write_bytes(whole[:-4])
        with pytest.raises(CheckpointError, match="cut off"):
            files.tensors.map()  # type: ignore[union-attr]


def test_tensors_in_memory_cannot_be_mapped(saved: Path) -> None:
    tensors = load_file(saved / SAFETENSORS_WEIGHTS_NAME)
    config = peftlite.LoraConfig.from_pretrained(saved)
    with pytest.raises(ConfigError, match="`mmap` is about files"):
        tiny("llama").load_adapter(peft_config=config, adapter_state_dict=tensors, mmap=True)
