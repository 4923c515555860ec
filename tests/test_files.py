"""Adapter files: read with suspicion, written so that a kill at any moment leaves the old adapter or the new one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_bytes

from peftlite import reading
from peftlite.checkpoint import files, pieces, tensorfile
from peftlite.checkpoint.files import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from peftlite.errors import AdapterFilesNotFoundError, CheckpointError

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q"]}
TEXT = json.dumps(CONFIG)
needs_links = pytest.mark.skipif(os.name == "nt", reason="links need rights there")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"q.lora_B.weight": torch.randn(3, 2), "q.lora_A.weight": torch.randn(2, 4), "n": torch.arange(3)}


def read(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with read_adapter(directory) as found:
        return found.config, {key: found.tensors.read(key) for key in found.tensors.infos}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def put(directory: Path, weights: bytes | None = None, config: bytes = b'{"peft_type": "LORA"}') -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_NAME).write_bytes(config)
    if weights is not None:
        (directory / SAFETENSORS_WEIGHTS_NAME).write_bytes(weights)
    return directory


def with_header(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# ---- what is written


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_adapter(tmp_path / "deep" / "er", TEXT, tensors())
    config, found = read(tmp_path / "deep" / "er")
    assert config == CONFIG
    assert same(found, tensors())
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]


def test_bytes_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    everything = {
        f"é {dtype}": torch.arange(6).reshape(2, 3).to(torch.uint8).to(dtype) for dtype in tensorfile.DTYPES.values()
    }
    everything |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "": torch.ones(1, dtype=torch.bfloat16)}
    write_adapter(tmp_path, TEXT, everything)
    assert (tmp_path / SAFETENSORS_WEIGHTS_NAME).read_bytes() == save_bytes(everything, {"format": "pt"})
    assert same(read(tmp_path)[1], everything)
    assert same(load_file(tmp_path / SAFETENSORS_WEIGHTS_NAME), everything)


def test_equal_adapters_give_equal_bytes(tmp_path: Path) -> None:
    metadata = {"b": "2", "a": "1", "c": "3"}
    write_adapter(tmp_path / "a", TEXT, tensors(), metadata)
    turned = dict(reversed(list(tensors().items())))
    turned["q.lora_A.weight"] = turned["q.lora_A.weight"].t().contiguous().t()
    write_adapter(tmp_path / "b", TEXT, turned, dict(reversed(metadata.items())))
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with read_adapter(tmp_path / "a") as found:
        assert found.metadata == {"format": "pt", **metadata}
    load_file(tmp_path / "a" / SAFETENSORS_WEIGHTS_NAME)


def test_tensors_of_every_make_are_written_by_value(tmp_path: Path) -> None:
    class Marked(torch.Tensor):
        pass

    base = torch.randn(4, 6)
    made = {
        "parameter": torch.nn.Parameter(base.clone()),
        "shared": base,
        "shared too": base,
        "strided": base.t()[::2],
        "expanded": base[:1].expand(4, 6),
        "subclass": base.as_subclass(Marked),
        "conjugated": torch.randn(3, dtype=torch.complex64).conj(),
        "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
    }
    write_adapter(tmp_path, TEXT, made)
    found = read(tmp_path)[1]
    assert same(found, {k: v.detach().as_subclass(torch.Tensor).clone() for k, v in made.items()})


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.zeros(1, dtype=torch.complex128), "complex128"),
        (torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), "Nested"),
    ],
)
def test_a_tensor_without_a_place_in_the_format_is_refused(tmp_path: Path, tensor: torch.Tensor, words: str) -> None:
    write_adapter(tmp_path, TEXT, tensors())
    with pytest.raises(CheckpointError, match=f"(?s)`bad`.*{words}"):
        write_adapter(tmp_path, "{}", {"bad": tensor})
    assert read(tmp_path)[0] == CONFIG
    assert len(list(tmp_path.iterdir())) == 2


def test_a_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not UTF-8"):
        write_adapter(tmp_path, TEXT, {"\ud800": torch.ones(1)})
    assert not (tmp_path / CONFIG_NAME).exists()


@pytest.mark.skipif(os.name == "nt", reason="writes piece by piece there")
@pytest.mark.parametrize("at_once", [1, 7, 64, 1 << 20])
def test_a_file_is_the_same_however_much_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    write_adapter(tmp_path / "plain", TEXT, MIXED)
    writev, calls = os.writev, []

    def some(handle: int, pieces: Sequence[memoryview]) -> int:
        calls.append(len(pieces))
        whole = b"".join(pieces)
        return writev(handle, [whole[: min(len(whole), 5)]])

    monkeypatch.setattr(os, "writev", some)
    monkeypatch.setattr(pieces, "CHUNK", at_once)
    monkeypatch.setattr(pieces, "PIECES", 3)
    write_adapter(tmp_path / "other", TEXT, MIXED)
    weights = [(tmp_path / name / SAFETENSORS_WEIGHTS_NAME).read_bytes() for name in ("plain", "other")]
    assert weights[0] == weights[1]
    assert max(calls) == {1: 1, 7: 2, 64: 3, 1 << 20: 3}[at_once]


def test_a_file_is_the_same_where_the_system_writes_one_piece_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "plain", TEXT, MIXED)
    monkeypatch.delattr(os, "writev", raising=False)
    write_adapter(tmp_path / "other", TEXT, MIXED)
    weights = [(tmp_path / name / SAFETENSORS_WEIGHTS_NAME).read_bytes() for name in ("plain", "other")]
    assert weights[0] == weights[1]


def _unknown(name: str) -> int:
    raise ValueError("unrecognized configuration name")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(lambda name: 1024, 1024), (lambda name: 16, 16), (lambda name: -1, 16), (_unknown, 16), (None, 16)],
    ids=["many", "few", "no limit known", "no such name", "no such function"],
)
def test_the_system_says_how_many_pieces_it_takes(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], int] | None, expected: int
) -> None:
    if answer is None:
        monkeypatch.delattr(os, "sysconf", raising=False)
    else:
        monkeypatch.setattr(os, "sysconf", answer, raising=False)
    assert pieces.pieces_at_once() == expected


@pytest.mark.skipif(os.name == "nt", reason="has no such calls")
def test_a_system_that_takes_few_pieces_is_given_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv, writev, counts = os.preadv, os.writev, {"read": 0, "written": 0}

    def counted(what: str, pieces: Sequence[Any]) -> None:
        if len(pieces) > 16:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        counts[what] = max(counts[what], len(pieces))

    def read(handle: int, places: Sequence[Any], at: int) -> int:
        counted("read", places)
        return preadv(handle, places, at)

    def written(handle: int, pieces: Sequence[memoryview]) -> int:
        counted("written", pieces)
        return writev(handle, pieces)

    monkeypatch.setattr(os, "sysconf", lambda name: 16)
    for module in (tensorfile, pieces):
        monkeypatch.setattr(module, "PIECES", pieces.pieces_at_once())
    monkeypatch.setattr(tensorfile, "_preadv", read)
    monkeypatch.setattr(os, "writev", written)
    many = {f"{at:03}": torch.tensor([float(at)]) for at in range(100)}
    write_adapter(tmp_path, TEXT, many)
    with read_adapter(tmp_path) as found:
        assert same(dict(tensorfile.read_each(found.tensors, many)), many)
    assert counts == {"read": 16, "written": 16}


def test_a_tensor_read_does_not_change_with_the_file(tmp_path: Path) -> None:
    write_adapter(tmp_path, TEXT, tensors())
    with read_adapter(tmp_path) as found:
        kept = found.tensors.read("q.lora_A.weight")
        path = tmp_path / SAFETENSORS_WEIGHTS_NAME
        os.truncate(path, path.stat().st_size - 8)  # in place, as other libraries write
        with pytest.raises(CheckpointError, match="cut off"):
            [found.tensors.read(key) for key in found.tensors.infos]
    assert torch.equal(kept, tensors()["q.lora_A.weight"])


# ---- what is read


MIXED = {
    "a": torch.arange(9),
    "b": torch.full((40,), 3e38),  # whose sum is not finite
    "c": torch.randn(3, 2),
    "d": torch.zeros(0),
    "e": torch.randn(5).bfloat16(),
    "f": torch.tensor(1.5),
    "g": torch.ones(30).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("at_once", [1, 64, 1 << 20])
@pytest.mark.parametrize("system", ["usual", "gives less", "has no such call"])
def test_tensors_are_read_the_same_however_many_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, system: str
) -> None:
    preadv, calls = tensorfile._preadv, []

    def some(handle: int, places: Sequence[Any], at: int) -> int:
        calls.append(len(places))
        assert preadv is not None
        return preadv(handle, places if system == "usual" else places[:1], at)

    monkeypatch.setattr(tensorfile, "_preadv", None if system == "has no such call" or preadv is None else some)
    monkeypatch.setattr(tensorfile, "_LOOK", at_once)
    monkeypatch.setattr(tensorfile, "PIECES", 3)
    given = {**MIXED, "h": torch.randn(2, 3), "i": torch.randn(4), "j": torch.randn(1), "k": torch.randn(2)}
    write_adapter(tmp_path, TEXT, given)
    with read_adapter(tmp_path) as found:
        for keys in (list(found.tensors.infos), sorted(given, reverse=True), ["c", "i"]):
            read_now = dict(tensorfile.read_each(found.tensors, keys))
            assert list(read_now) == keys
            assert same(read_now, {key: given[key] for key in keys})
        path = tmp_path / SAFETENSORS_WEIGHTS_NAME
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="cut off"):
            list(tensorfile.read_each(found.tensors, found.tensors.infos))
    assert not calls or max(calls) == (3 if at_once > 1 else 1)


@pytest.mark.parametrize("at_once", [16, 64, 1 << 20])
@pytest.mark.parametrize("key", [None, *"bcefg"])
def test_a_tensor_that_is_not_finite_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, at_once: int
) -> None:
    monkeypatch.setattr(tensorfile, "_LOOK", at_once)
    given = {name: tensor.clone() for name, tensor in MIXED.items()}
    if key is not None:
        given[key].view(-1)[-1:] = torch.tensor([float("nan")], dtype=given[key].dtype)
    write_adapter(tmp_path, TEXT, given)
    with read_adapter(tmp_path) as found:
        assert found.tensors.not_finite() == key
    assert tensorfile.MemoryTensors(given).not_finite() == key


@pytest.mark.parametrize("many_at_once", [True, False], ids=["many at once", "one at a time"])
def test_tensors_of_all_kinds_are_read_into_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many_at_once: bool
) -> None:
    if not many_at_once:
        monkeypatch.setattr(tensorfile, "_preadv", None)
    write_adapter(tmp_path, TEXT, MIXED)
    places = {key: torch.zeros_like(tensor) for key, tensor in MIXED.items()}
    places["c"] = torch.zeros(2, 3).t()
    places["e"] = torch.nn.Parameter(torch.zeros(5))
    versions = {key: tensor._version for key, tensor in places.items()}
    with read_adapter(tmp_path) as found:
        found.tensors.read_into(reversed(places.items()))
    for key, tensor in places.items():
        assert torch.equal(tensor.detach().double(), MIXED[key].double()), key
        assert tensor._version > versions[key]


def test_pickled_weights_are_read_only_where_there_are_no_others(tmp_path: Path) -> None:
    put(tmp_path)
    torch.save(tensors(1), tmp_path / WEIGHTS_NAME)
    assert same(read(tmp_path)[1], tensors(1))
    with pytest.raises(CheckpointError, match="allow_pickle"):
        read_adapter(tmp_path, allow_pickle=False)
    save_file(tensors(2), tmp_path / SAFETENSORS_WEIGHTS_NAME)
    assert same(read(tmp_path)[1], tensors(2))


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize(
    "weights",
    [{"a": Malice()}, Malice(), [torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {"a": torch.eye(2).to_sparse()}],
)
def test_a_pickle_gives_tensors_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path)
    torch.save(weights, WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="tensors"):
        read_adapter(tmp_path)
    assert not Path("code-was-run").exists()


def test_a_pickle_that_unpacks_to_more_than_its_size_is_not_read(tmp_path: Path) -> None:
    put(tmp_path)
    with zipfile.ZipFile(tmp_path / WEIGHTS_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1_000_000)
    with pytest.raises(CheckpointError, match="unpacks to more"):
        read_adapter(tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"not a file of torch\.save"):
        read_adapter(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFilesNotFoundError, match="no directory"):
        read_adapter(tmp_path / "none")
    write_adapter(tmp_path / "other", TEXT, tensors())
    with pytest.raises(AdapterFilesNotFoundError, match=r"(?s)no `adapter_config.json`.*sub-directories `other`"):
        read_adapter(tmp_path)
    put(tmp_path)
    with pytest.raises(AdapterFilesNotFoundError, match=r"no `adapter_model.safetensors`"):
        read_adapter(tmp_path)
    assert files.read_config(tmp_path) == {"peft_type": "LORA"}
    (tmp_path / "other" / CONFIG_NAME).unlink()
    with read_adapter(tmp_path / "other", config=False) as found:
        assert found.config == {}
        assert set(found.tensors.infos) == set(tensors())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", "not a JSON file"),
        (b"{", "not a JSON file"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'{"r": NaN}', "NaN"),
        (b'{"r": -Infinity}', "Infinity"),
        (b'{"r": 1e999}', "1e999"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not a JSON file"),
        (b"\xff\xfe{}", "not a JSON file"),
        (b'{"target_modules": "\\ud800"}', "not a JSON file"),
        (b'{"a":' * 17 + b"1" + b"}" * 17, "deep"),
        (b"[" * 1_000_000, "deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deep"),
        (b'{"a": "' + b"x" * reading.MAX_JSON + b'"}', "larger than"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path: Path, config: bytes, words: str) -> None:
    put(tmp_path, save_bytes(tensors()), config)
    with pytest.raises(CheckpointError, match=words):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        files.read_config(tmp_path)


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    put(tmp_path, config=b"\xef\xbb\xbf{}")
    assert files.read_config(tmp_path) == {}


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (b"", "claims 0 bytes, and the file has 0"),
        (b"\x00" * 7, "the file has 7"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "more than"),
        (with_header(b"[]"), "not a JSON object"),
        (with_header(b"[1]"), "not a JSON object"),
        (with_header(b"1"), "not a JSON object"),
        (with_header(b"{"), "cannot be read"),
        (with_header(b"\xff"), "cannot be read"),
        (with_header(b"[" * 1000), "not a list of tensors"),
        (with_header(b'{"a":1,"a":2}'), "twice"),
        (with_header(b'{"\\ud800":1}'), "cannot be read"),
        (with_header({"a": 1}), "not one of a tensor"),
        (with_header({"a": entry() | {"more": 1}}), "not one of a tensor"),
        (with_header({"__metadata__": {"a": 1}}), "metadata"),
        (with_header({"__metadata__": []}), "metadata"),
        (with_header({"a": entry("F31")}, b"0000"), "`F31`"),
        (with_header({"a": entry(["F32"])}, b"0000"), "dtype"),
        (with_header({"a": entry(shape=[-1])}, b"0000"), "non-negative"),
        (with_header({"a": entry(shape=[True])}, b"0000"), "non-negative"),
        (with_header({"a": entry(shape=[1.0])}, b"0000"), "non-negative"),
        (with_header({"a": entry(shape=[1] * 17)}, b"0000"), "non-negative"),
        (with_header({"a": entry(offsets=[0])}, b"0000"), "non-negative"),
        (with_header({"a": entry(offsets=[4, 0])}, b"0000"), "needs 4"),
        (with_header({"a": entry(shape=[2**40, 2**40])}, b"0000"), "needs"),
        (with_header({"a": entry(shape=[10**9])}, b"0000"), "needs 4000000000"),
        (with_header({"a": entry(offsets=[4, 8])}, b"0" * 8), "begins at byte 4"),
        (with_header({"a": entry(), "b": entry()}, b"0" * 4), "begins at byte 0"),
        (with_header({"a": entry(), "b": entry(offsets=[8, 12])}, b"0" * 12), "begins at byte 8"),
        (with_header({"a": entry()}, b"0" * 5), "accounts for 4 bytes of tensors, and 5"),
        (with_header({"a": entry(shape=[10**9], offsets=[0, 4 * 10**9])}, b"0"), "4000000000 bytes of tensors, and 1"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path: Path, weights: bytes, words: str) -> None:
    put(tmp_path, weights)
    with pytest.raises(CheckpointError, match=words):
        read_adapter(tmp_path)


def _read_or_refuse(directory: Path) -> None:
    try:
        read(directory)
    except CheckpointError as error:
        assert len(str(error)) < 2000  # noqa: PT017


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_spoilt_weights_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    good = bytearray(save_bytes(tensors(), {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    _read_or_refuse(put(tmp_path_factory.mktemp("fuzz"), bytes(good[: data.draw(st.integers(0, len(good)))])))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*tensorfile.DTYPES, "F4", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 2**65), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
    }
)


@given(
    st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | json_values, max_size=4),
    st.binary(max_size=32),
)
@settings(max_examples=300, deadline=None)
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes) -> None:
    _read_or_refuse(put(tmp_path_factory.mktemp("fuzz"), with_header(header, data)))


@given(st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
@settings(max_examples=300, deadline=None)
def test_any_config_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, config: bytes) -> None:
    directory = put(tmp_path_factory.mktemp("fuzz"), config=config)
    try:
        assert isinstance(files.read_config(directory), dict)
    except CheckpointError as error:
        assert len(str(error)) < 2000  # noqa: PT017


# ---- paths


@needs_links
def test_links_that_leave_the_directory_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "mine", TEXT, tensors())
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        theirs = tmp_path / f"theirs-{name}"
        write_adapter(theirs, TEXT, tensors())
        (theirs / name).unlink()
        for target in (tmp_path / "mine" / name, Path("../mine") / name, Path("sub") / ".." / ".." / "mine" / name):
            (theirs / "sub").mkdir(exist_ok=True)
            (theirs / name).symlink_to(target)
            with pytest.raises(CheckpointError, match="link that leaves"):
                read_adapter(theirs)
            (theirs / name).unlink()
        (theirs / name).symlink_to(theirs / "nothing")
        with pytest.raises(CheckpointError, match="link to nothing"):
            read_adapter(theirs)
        (theirs / name).unlink()
        (theirs / name).symlink_to(name)
        with pytest.raises(CheckpointError, match="link to nothing"):
            read_adapter(theirs)


@needs_links
def test_links_within_the_directory_and_to_the_directory_are_followed(tmp_path: Path) -> None:
    write_adapter(tmp_path / "real", TEXT, tensors())
    (tmp_path / "real" / "blob").write_bytes((tmp_path / "real" / SAFETENSORS_WEIGHTS_NAME).read_bytes())
    (tmp_path / "real" / SAFETENSORS_WEIGHTS_NAME).unlink()
    (tmp_path / "real" / SAFETENSORS_WEIGHTS_NAME).symlink_to("blob")
    (tmp_path / "link").symlink_to("real")
    assert same(read(tmp_path / "link")[1], tensors())


@needs_links
@pytest.mark.parametrize("subfolder", ["", "sub"])
def test_a_hub_cache_is_read_through_its_links(tmp_path: Path, subfolder: str) -> None:
    write_adapter(tmp_path / "made", TEXT, tensors())
    repo = tmp_path / "hub" / "models--a--b"
    snapshot = repo / "snapshots" / ("0" * 40) / subfolder
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        (repo / "blobs" / f"blob-{name}").write_bytes((tmp_path / "made" / name).read_bytes())
        (snapshot / name).symlink_to(os.path.relpath(repo / "blobs" / f"blob-{name}", snapshot))
    assert same(read(snapshot)[1], tensors())
    (repo / "blobs").rename(tmp_path / "elsewhere")
    (repo / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="link that leaves"):
        read_adapter(snapshot)


@pytest.mark.skipif(os.name == "nt", reason="no named pipes")
@pytest.mark.parametrize("name", [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])
def test_a_pipe_does_not_block(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path, TEXT, tensors())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_adapter(tmp_path)
