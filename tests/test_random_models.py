"""Random models and random configs: what is adapted, outputs, files, merging and leaving, beside real PEFT."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peft
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import peftlite
from peftlite.core.tree import named_layers
from peftlite.errors import MergeError, PeftliteError
from tests.adapters import randomised, snapshot

EXAMPLES = int(os.environ.get("RANDOM_MODELS", "120"))

# ---- models
IN, OUT, VOCAB = 6, 4, 7
LAYERS: Final[dict[str, Callable[[], nn.Module]]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "bare": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "embedding": lambda: nn.Embedding(VOCAB, OUT),
    "conv2d": lambda: nn.Conv2d(IN, OUT, 3, padding=1),
    "norm": lambda: nn.LayerNorm(IN),
    "relu": nn.ReLU,
}
INPUTS: Final[dict[str, Tensor]] = {
    "embedding": torch.arange(VOCAB).reshape(1, -1),
    "conv2d": torch.sin(torch.arange(IN * 9.0)).reshape(1, IN, 3, 3),
}
VECTORS: Final = torch.cos(torch.arange(3.0 * IN)).reshape(1, 3, IN)
NAMES: Final = ["q", "v_q", "attn", "mlp", "layers", "h", "head", "lm_head"]
Tree = str | list["Tree"] | dict[str, "Tree"]
"""A kind of layer; a list of parts; or parts by name."""


def built(tree: Any) -> nn.Module:
    if isinstance(tree, str):
        return LAYERS[tree]()
    if isinstance(tree, list):
        return nn.Sequential(*map(built, tree)) if len(tree) % 2 else nn.ModuleList(map(built, tree))
    module = nn.Module()
    for name, part in tree.items():
        module.add_module(name, built(part))
    return module


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(path, kind)"""
    if isinstance(tree, str):
        yield prefix[:-1], tree
        return
    for name, part in enumerate(tree) if isinstance(tree, list) else tree.items():
        yield from leaves(part, f"{prefix}{name}.")


class Net(PreTrainedModel):
    """Every layer is given an input of its own; the outputs of all, one after the other."""

    config_class = PretrainedConfig

    def __init__(self, tree: Any) -> None:
        super().__init__(PretrainedConfig())
        self.leaves = dict(leaves(tree))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, part in tree.items():
                self.add_module(name, built(part))
        self.eval()

    def get_input_embeddings(self) -> None:  # PEFT asks
        return None

    def get_output_embeddings(self) -> None:
        return None

    def forward(self) -> Tensor:
        return torch.cat(
            [self.get_submodule(path)(INPUTS.get(kind, VECTORS)).flatten() for path, kind in self.leaves.items()]
        )


KINDS = st.sampled_from([*LAYERS, *(2 * ["linear", "bare", "Conv1D", "embedding", "conv2d"])])
PARTS = st.recursive(
    KINDS,
    lambda parts: (
        st.lists(parts, min_size=1, max_size=3) | st.dictionaries(st.sampled_from(NAMES), parts, min_size=1, max_size=3)
    ),
    max_leaves=6,
)
TREES = st.dictionaries(st.sampled_from(NAMES), PARTS, min_size=1, max_size=4)


# ---- configs
REGEXES: Final = [".*", r".*\.q", r".*(q|head)", r".*\.[01]", r"(layers|h)\..*", "q|head|mlp"]
FORMS: Final[dict[str, st.SearchStrategy[dict[str, Any]]]] = {
    "LoraConfig": st.fixed_dictionaries(
        {"r": st.integers(1, 5), "lora_alpha": st.integers(1, 9), "init_lora_weights": st.booleans()},
        optional={
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "lora_bias": st.booleans(),
            "bias": st.sampled_from(["all", "lora_only"]),
        },
    ),
    "LoHaConfig": st.fixed_dictionaries(
        {"r": st.integers(1, 4), "alpha": st.integers(1, 9), "init_weights": st.booleans()},
        optional={"use_effective_conv2d": st.booleans()},
    ),
    "IA3Config": st.fixed_dictionaries({"init_ia3_weights": st.booleans()}),
    "AdaLoraConfig": st.fixed_dictionaries(
        {"init_r": st.integers(1, 5), "target_r": st.just(1), "lora_alpha": st.integers(1, 9), "total_step": st.just(9)}
    ),
}


@dataclass(frozen=True)
class Case:
    """A model, and a config of this class for it."""

    tree: dict[str, Any]
    kind: str
    fields: dict[str, Any]

    def config(self, library: Any) -> Any:
        return getattr(library, self.kind)(**copy.deepcopy(self.fields))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    tree = draw(TREES)
    kind = draw(st.sampled_from([*FORMS, "LoraConfig"]))
    fields = draw(FORMS[kind])
    paths = [path for path, _ in leaves(tree)]
    parts = [path.split(".") for path in paths]
    ends = sorted({".".join(names[at:]) for names in parts for at in range(len(names))})
    fit = [path for path, layer in leaves(tree) if layer not in ("norm", "relu")] or paths
    entries = st.sampled_from(fit) | st.sampled_from([path.rpartition(".")[2] for path in fit]) | st.sampled_from(ends)
    fields["target_modules"] = draw(
        st.lists(entries, min_size=1, max_size=3, unique=True) | st.sampled_from(REGEXES) | st.just("all-linear")
    )
    named = isinstance(fields["target_modules"], list)
    if draw(st.integers(0, 3)) == 0:
        fields["exclude_modules"] = draw(st.lists(entries, min_size=1, max_size=2) | st.sampled_from(REGEXES[1:]))
    modules = [path for path, _ in built(tree).named_modules() if path]
    wholes = [end for end in modules if sum(path.endswith(end) for path in modules) == 1]  # PEFT adapts some twice
    if wholes and draw(st.integers(0, 3)) == 0:
        fields["modules_to_save"] = [draw(st.sampled_from(wholes))]
    if kind == "IA3Config":
        fields["feedforward_modules"] = fields["target_modules"][: draw(st.integers(0, 2))] if named else []
    elif named and draw(st.integers(0, 3)) == 0:
        fields["layers_to_transform"] = draw(st.integers(0, 2) | st.lists(st.integers(0, 2), min_size=1, max_size=2))
        fields["layers_pattern"] = draw(st.none() | st.sampled_from(["layers", "h", ["h", "layers"]]))
    if kind in ("LoraConfig", "LoHaConfig"):
        patterns = st.dictionaries(entries | st.sampled_from(["^q", r".*\.q", "head"]), st.integers(1, 4), max_size=2)
        fields["rank_pattern"], fields["alpha_pattern"] = draw(patterns), draw(patterns)
    return Case(tree, kind, fields)


# ---- both libraries
@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def ours_of(case: Case) -> Any:
    """The wrapped model, or None where we refuse; then nothing was changed."""
    base = Net(case.tree)
    before = snapshot(base)
    try:
        return peftlite.get_peft_model(base, case.config(peftlite), unmatched="ignore")
    except PeftliteError as error:
        event(f"refused: {type(error).__name__}")
        assert snapshot(base) == before
        return None


def theirs_of(case: Case) -> Any:
    try:
        return peft.get_peft_model(Net(case.tree), case.config(peft))
    except Exception as error:
        event(f"PEFT refuses: {type(error).__name__}")
        return None


def is_whole(layer: Any) -> bool:
    """Whether it is trained whole."""
    return bool(layer.tuner.base_slot == "original_module")


def adapted(model: Any) -> dict[str, bool]:
    """Path -> whether it is trained whole."""
    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    found = {path: part for path, part in model.base_model.model.named_modules() if isinstance(part, kinds)}
    return {path: isinstance(part, ModulesToSaveWrapper) for path, part in found.items()}


def more_than_in_peft(case: Case, ours: Any) -> bool:
    """Whether we adapt what PEFT cannot: a row of docs/differences.md says so."""
    layers = {} if ours is None else dict(named_layers(ours))
    if case.kind == "LoHaConfig" and any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()):
        return True
    others = [path for path, _ in built(case.tree).named_modules() if path not in layers]
    return case.fields["target_modules"] == "all-linear" and any(
        other.endswith(f".{path}") for other in others for path in layers
    )


@settings(max_examples=EXAMPLES)
@given(cases())
def test_random_adapters_on_random_models(case: Case) -> None:
    with quiet():
        ours = ours_of(case)
        if not more_than_in_peft(case, ours):
            theirs = theirs_of(case)
            assert (ours is None) == (theirs is None), (ours, theirs)
            if ours is not None:
                randomised(ours)
                same_as_peft(ours, theirs)
                same_files(ours, theirs)
        if ours is not None:
            event(case.kind)
            randomised(ours)
            reloading(ours, case)
            merging(ours, case)
            leaving(ours, case)


def same_as_peft(ours: Any, theirs: Any) -> None:
    assert {path: is_whole(layer) for path, layer in named_layers(ours)} == adapted(theirs)
    trainable = [[n for n, p in model.named_parameters() if p.requires_grad] for model in (ours, theirs)]
    assert trainable[0] == trainable[1]
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(), theirs(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def same_files(ours: Any, theirs: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, whose) for whose in ("ours", "theirs")]
        for model, place in zip((ours, theirs), places, strict=True):
            model.save_pretrained(place)
        mine, other = (load_file(place / "adapter_model.safetensors") for place in places)
    other = {key.replace("modules_to_save.default.", "modules_to_save."): tensor for key, tensor in other.items()}
    assert mine.keys() == other.keys()  # PEFT forgets the name in keys of biases
    assert all(torch.equal(mine[key], other[key]) for key in mine)


@torch.no_grad()
def reloading(ours: Any, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        inplace = Net(case.tree)
        peftlite.load_adapter(inplace, folder)
        for model in (inplace, peftlite.PeftModel.from_pretrained(Net(case.tree), folder)):
            assert torch.equal(model(), ours())


@torch.no_grad()
def merging(ours: Any, case: Case) -> None:
    expected = ours()
    before = {key: tensor.clone() for key, tensor in ours.state_dict().items()}
    bare = any(not is_whole(layer) and layer.host.bias is None for _, layer in named_layers(ours))
    with pytest.raises(MergeError) if case.fields.get("lora_bias") and bare else nullcontext():
        ours.merge_adapter()
        torch.testing.assert_close(ours(), expected, rtol=1e-4, atol=1e-4)
        ours.unmerge_adapter()
    after = ours.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(ours(), expected)


@torch.no_grad()
def leaving(ours: Any, case: Case) -> None:
    fresh = Net(case.tree)
    deleted = copy.deepcopy(ours)
    peftlite.delete_adapter(deleted, "default")
    for base in (deleted.base_model.model, ours.unload()):
        assert repr(base) == repr(fresh)
        assert base.state_dict().keys() == fresh.state_dict().keys()
        assert torch.equal(base(), fresh())
