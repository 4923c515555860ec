"""examples/finetune.py does its whole job, small, and says in one line what is wrong with its input."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
WRITTEN = ("loss.png", "results.json", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
SMALL = ("--fast", "--steps", "8", "--rank", "4", "--lr", "0.02", "--block-size", "32")
SENTENCES = [f"Sentence {i} says that {i} and {i + 1} are {2 * i + 1} together." for i in range(80)]
PNG = b"\x89PNG\r\n\x1a\n"

Command = Callable[..., int]


@pytest.fixture(scope="module")
def finetune() -> Any:
    """The script as a module; it finds its own helpers beside it, as it does when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("finetune")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def command(finetune: Any, cache: Path) -> Command:
    def run(*arguments: object) -> int:
        return int(finetune.main([*SMALL, "--cache", str(cache), *map(str, arguments)]))

    return run


@pytest.fixture
def base(command: Command, cache: Path, tmp_path: Path) -> Path:
    """The directory of the small Llama: a model as a user has one."""
    if not list(cache.glob("base-*")):
        assert command("--output", tmp_path / "making-the-base") == 0
    (directory,) = cache.glob("base-*")
    return directory


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results.json").read_text("utf-8"))
    return found


def logged(output: Path, key: str) -> list[float]:
    return [entry[key] for entry in results(output)["log"] if key in entry]


def check_output(output: Path) -> None:
    assert all((output / name).is_file() for name in WRITTEN)
    assert (output / "loss.png").read_bytes().startswith(PNG)
    found = results(output)
    assert found["adapted"]["loss"] < found["base"]["loss"]
    assert found["adapted"]["bits_per_byte"] < found["base"]["bits_per_byte"]
    assert len(logged(output, "loss")) == 8
    assert logged(output, "eval_loss")[-1] == found["adapted"]["loss"]
    assert found["wrapped_equal"] is True
    assert found["in_place_equal"] is True
    assert 0 <= found["merged_difference"] < 1e-4


def test_the_main_job(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--output", tmp_path / "demo") == 0
    check_output(tmp_path / "demo")
    printed = capsys.readouterr().out
    for line in ("held-out text", "the base model continues 'def '", "the adapted model continues 'def '"):
        assert line in printed
    assert printed.count("logits equal: True") == 2


def test_equal_seeds_give_equal_adapters_and_the_base_model_is_made_once(
    command: Command, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        assert command("--output", tmp_path / name, "--seed", 0) == 0
    assert capsys.readouterr().out.count(f"base model: {base}, from an earlier run") == 2
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    assert logged(tmp_path / "one", "eval_loss") == logged(tmp_path / "two", "eval_loss")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_your_own_model_and_text(
    command: Command, base: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / f"mine{suffix}"
    lines = SENTENCES if suffix == ".txt" else [json.dumps({"text": sentence}) for sentence in SENTENCES]
    data.write_text("\n".join(lines) + "\n", "utf-8")
    assert command("--model", base, "--data", data, "--output", tmp_path / "mine") == 0
    check_output(tmp_path / "mine")
    held_out = SENTENCES[9] if suffix == ".jsonl" else SENTENCES[72]  # every tenth text; the last tenth of the only one
    opening = capsys.readouterr().out.partition("the base model continues '")[2].partition("'")[0]
    assert opening in held_out


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], 5e-3), (["--model", "mine"], 2e-4), (["--model", "mine", "--lr", "0.01"], 0.01)]
)
def test_a_model_of_yours_learns_at_a_careful_rate(finetune: Any, arguments: list[str], expected: float) -> None:
    assert finetune.learning_rate(finetune.parse(arguments)) == expected


def test_the_script_runs_as_a_command(tmp_path: Path) -> None:
    line = [sys.executable, str(EXAMPLES / "finetune.py"), "--data", "absent.txt"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --data `absent.txt` cannot be read: ")
    assert "Traceback" not in done.stderr


BAD_FILES = {
    "empty.txt": ("", "is empty"),
    "blank.jsonl": ("\n \n", "is empty"),
    "table.csv": ("a,b\n", "ends in neither .txt nor .jsonl"),
    "small.txt": ("Three short words.", "the text is too small: 0 training and 0 held-out blocks of 32 tokens"),
    "no-text.jsonl": ('{"text": "a"}\n{"body": "b"}\n', 'line 2, has no field "text" with a string; it has: `body`'),
    "number.jsonl": ('{"text": 3}\n', 'line 1, has no field "text" with a string; it has: `text`'),
    "list.jsonl": ("[1]\n", 'line 1, is a list, not an object with a field "text"'),
    "broken.jsonl": ('{"text": "a"}\n\n{"text":\n', "line 3, is not JSON: "),
}


def refused(command: Command, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that says why; nothing is written but the output directory."""
    assert command(*arguments) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_used(
    command: Command, base: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, complaint = BAD_FILES[name]
    path = tmp_path / name
    path.write_text(content, "utf-8")
    capsys.readouterr()
    line = refused(command, capsys, "--model", base, "--data", path, "--output", tmp_path / "out")
    assert complaint in line
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "No such file"), (b"\xff\xfe\x00", "'utf-8' codec can't decode")]
)
def test_a_file_that_cannot_be_read(
    command: Command, content: bytes | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    line = refused(command, capsys, "--data", path, "--output", tmp_path / "out")
    assert f"--data `{path}` cannot be read: " in line
    assert complaint in line


def test_a_model_that_is_not_there(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(command, capsys, "--model", "nobody/no-such-model", "--output", tmp_path / "out")
    assert "--model `nobody/no-such-model` cannot be loaded: " in line


def test_layers_that_the_model_does_not_have(
    command: Command, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    line = refused(command, capsys, "--model", base, "--target-modules", "query_key", "--output", tmp_path / "out")
    assert "`query_key`" in line


def test_blocks_longer_than_the_model_reads(
    command: Command, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    line = refused(command, capsys, "--model", base, "--block-size", "2048", "--output", tmp_path / "out")
    assert "--block-size `2048`" in line


def test_an_output_directory_that_is_a_file(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    line = refused(command, capsys, "--output", tmp_path / "file")
    assert f"--output `{tmp_path / 'file'}` cannot be made: " in line
