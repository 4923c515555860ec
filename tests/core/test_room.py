"""Large pages under large tensors."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftlite.core import room
from peftlite.core.room import LARGE, cloned, copied_in_groups, in_large_pages, is_plain
from peftlite.core.transaction import atomic, keep_values

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of_memory(address: int) -> list[str]:
    """What Linux says of the mapping that an address lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, *rest = line.split()
        if "-" in head and not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "VmFlags:":
            return rest
    raise AssertionError(f"{address:x} is in no mapping")


@pytest.mark.skipif(not PAGES.exists(), reason="this system has no large pages to ask for")
def test_large_tensors_lie_where_large_pages_are_wanted() -> None:
    tensor = in_large_pages(torch.empty(LARGE, dtype=torch.uint8))
    assert "hg" in flags_of_memory(tensor.data_ptr() + LARGE // 2)
    assert tensor.fill_(7).long().sum() == 7 * LARGE


def test_pages_are_asked_for_from_where_a_large_tensor_begins_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("peftlite.core.room._madvise", lambda start, size, _: asked.append((start, start + size)))
    in_large_pages(torch.empty(LARGE - 1, dtype=torch.uint8))
    assert not asked
    tensor = in_large_pages(torch.empty(LARGE, dtype=torch.uint8))
    ((begin, end),) = asked
    assert 0 <= tensor.data_ptr() - begin < mmap.PAGESIZE
    assert begin % mmap.PAGESIZE == 0
    assert end == tensor.data_ptr() + LARGE


@pytest.mark.parametrize("shape", [(3, 5), (2048, 2048), (0, 7)])
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]), turned=st.booleans())
def test_a_clone_has_the_numbers_and_memory_of_its_own(
    shape: tuple[int, int], dtype: torch.dtype, turned: bool
) -> None:
    first = torch.randint(-9, 9, shape).to(dtype)
    first = first.t() if turned else first
    second = cloned(torch.nn.Parameter(first, requires_grad=False))
    assert torch.equal(first, second)
    assert type(second) is torch.Tensor
    assert (second.dtype, second.stride(), second.requires_grad) == (dtype, first.stride(), False)
    assert not first.numel() or second.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    assert second.untyped_storage().nbytes() == first.untyped_storage().nbytes()


def test_tensors_without_memory_are_cloned_as_torch_does() -> None:
    assert cloned(torch.empty(LARGE, device="meta")).is_meta


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(4, 3),
        "number": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(torch.randn(5).bfloat16()),
        "odd": torch.ones(3, dtype=torch.int8),
        "none": torch.empty(0, 2),
        "double": torch.randn(2).double(),
        "complex": torch.randn(2, dtype=torch.complex64),
        "turned": torch.randn(4, 3).t(),
        "rows": torch.randn(4, 6)[:, :2],
    }


@pytest.mark.parametrize("most", [1, 40, 1 << 20])
def test_copies_of_many_tensors_lie_in_few_groups(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MOST", most)
    plain = [tensor for tensor in tensors_of_all_kinds().values() if is_plain(tensor)]
    groups = copied_in_groups(plain)
    assert sum(len(group) for group, _ in groups) == len(plain) == 7
    for group, copies in groups:
        assert torch.equal(torch.cat(group), copies)
        assert len(copies) <= most or len(group) == 1
    assert len(groups) == {1: 7, 40: 3, 1 << 20: 1}[most]
    flat = [one for group, _ in groups for one in group]
    assert [one.data_ptr() for one in flat] == [tensor.data_ptr() for tensor in plain]


@pytest.mark.parametrize("most", [1, 40, 1 << 20])
def test_numbers_that_are_kept_come_back(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_MOST", most)
    tensors = tensors_of_all_kinds()
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in tensors.items()}

    @atomic
    def spoil() -> None:
        keep_values(*tensors.values())
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.fill_(7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        spoil()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor._version > before[name][1] + (tensor.numel() > 0)  # to be spoilt, and to be put back
