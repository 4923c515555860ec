"""Arrow: tokens choose among adapters as in real PEFT, in both shapes, and nothing else is changed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import peftlite
from peftlite import ArrowConfig, LoraConfig, create_arrow_model
from peftlite.core.tree import named_layers
from peftlite.errors import ConfigError, MergeError, StateError, UnsupportedLayerError
from tests.adapters import randomised, snapshot
from tests.models import batch, tiny

TASKS = ("task_0", "task_1", "task_2")
GENERAL = ("gks_0", "gks_1")
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def write(folder: Path, seed: int, **fields: Any) -> Path:
    """An adapter's files. Its first direction stands out, so that PEFT's 15 steps of iteration find it."""
    model = tiny("llama")
    peftlite.inject(model, LoraConfig(**{**FIELDS, **fields}))
    randomised(model, seed)
    with torch.no_grad():
        for _, layer in named_layers(model):
            for suffix, tensor in layer.tensors("default").items():
                tensor.mul_(0.1)
                if tensor.dim() == 2:
                    (tensor[0] if "_A" in suffix else tensor[:, 0]).mul_(6)
    peftlite.save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter -> where its files are."""
    root = tmp_path_factory.mktemp("arrow")
    return {name: write(root / name, seed) for seed, name in enumerate(TASKS + GENERAL)}


def model_of(files: dict[str, Path], library: Any = peftlite, base: str = "llama", **fields: Any) -> Any:
    paths = {kind: [str(files[name]) for name in names] for kind, names in (("tasks", TASKS), ("general", GENERAL))}
    general = paths["general"] if fields.get("use_gks") else None
    return library.create_arrow_model(tiny(base), paths["tasks"], library.ArrowConfig(**fields), general)


def in_place(files: dict[str, Path], **fields: Any) -> Any:
    model = tiny("llama")
    general = GENERAL if fields.get("use_gks") else ()
    for name in (*TASKS, *general):
        model.load_adapter(files[name], name)
    arrow = ArrowConfig(**fields, task_adapter_names=list(TASKS), gks_adapter_names=list(general))
    model.add_adapter(LoraConfig(**FIELDS, arrow_config=arrow, inference_mode=True), "arrow_router")
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch("llama")).logits  # type: ignore[no-any-return]


def routed(x: Tensor, pairs: list[tuple[Tensor, Tensor]], scalings: list[float], arrow: ArrowConfig) -> Tensor:
    """What the experts add for x (tokens, in), token by token, in float64."""
    rows = []
    for token in x.double():
        products = [B.double() @ A.double() for A, B in pairs]
        likeness = torch.stack([(torch.linalg.svd(product)[2][0] @ token).abs() for product in products])
        best = likeness.argsort(descending=True)[: arrow.top_k]
        shares = (likeness[best] / arrow.router_temperature).softmax(0)
        rows.append(
            sum(share * scalings[k] * products[k] @ token for share, k in zip(shares, best.tolist(), strict=True))
        )
    return torch.stack(rows)  # type: ignore[arg-type]


# ---- as PEFT
@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1},
        {"top_k": 2, "router_temperature": 0.3},
        {"top_k": 3, "router_temperature": 5.0},
        {"top_k": 2, "use_gks": True},
        {"top_k": 3, "use_gks": True, "rng_seed": 4},
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_peft(files: dict[str, Path], fields: dict[str, Any]) -> None:
    results = []
    for library in (peftlite, peft):
        model = model_of(files, library, **fields)
        x = model.get_input_embeddings()(batch("llama")["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=x).logits
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert float((results[0][0] - logits(tiny("llama"))).abs().max()) > 0.1


def test_the_config_is_that_of_peft(files: dict[str, Path]) -> None:
    configs = [model_of(files, library, top_k=2).peft_config["arrow_router"] for library in (peftlite, peft)]
    ours, theirs = (config.to_dict()["arrow_config"] for config in configs)
    theirs = vars(theirs) if not isinstance(theirs, dict) else theirs
    assert {**ours, "gks_adapter_names": []} == theirs
    assert sorted(configs[0].target_modules) == sorted(configs[1].target_modules)


# ---- as the formula
@pytest.mark.parametrize(
    "odd", [{"r": 2}, {"lora_alpha": 40}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str
)
def test_experts_of_any_rank_and_scaling(files: dict[str, Path], odd: dict[str, Any], tmp_path: Path) -> None:
    arrow = ArrowConfig(top_k=2)
    model = create_arrow_model(tiny("llama"), [files["task_0"], write(tmp_path, 9, **odd)], arrow)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    pairs, scalings = [], [layer.scaling[name] for name in TASKS[:2]]
    for name in TASKS[:2]:
        A, B = layer.lora_A[name], layer.lora_B[name]
        start = dict(A.named_buffers()), dict(B.named_buffers())
        first = [next(iter(buffers.values())) for buffers in start if buffers]
        pairs.append((torch.cat([A.weight, *first[:1]]), torch.cat([B.weight, *(-b for b in first[1:])], 1)))
    x = torch.randn(5, 16)
    with torch.no_grad():
        expected = layer.base_layer(x).double() + routed(x, pairs, scalings, arrow)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_experts_on_different_layers(files: dict[str, Path], tmp_path: Path) -> None:
    other = write(tmp_path, 9, target_modules=["q_proj", "down_proj"])
    model = create_arrow_model(tiny("llama"), [files["task_0"], other], ArrowConfig(top_k=2))
    assert model.peft_config["arrow_router"].target_modules == ["down_proj", "q_proj", "v_proj"]
    layers = model.get_base_model().model.layers[1]
    x = torch.randn(3, 32)
    with torch.no_grad():
        alone = layers.mlp.down_proj(x)
        model.set_adapter("task_1")
        torch.testing.assert_close(layers.mlp.down_proj(x), alone)


def test_general_adapters_leave_the_others_alone(files: dict[str, Path]) -> None:
    model = model_of(files, top_k=2, use_gks=True)
    logits(model)
    model.set_adapter("task_0")
    single = peftlite.PeftModel.from_pretrained(tiny("llama"), files["task_0"])
    assert torch.equal(logits(model), logits(single))


# ---- both shapes, calls, files
@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_k": 1, "use_gks": True}], ids=str)
def test_both_shapes_and_their_files(files: dict[str, Path], fields: dict[str, Any], tmp_path: Path) -> None:
    model, placed = model_of(files, **fields), in_place(files, **fields)
    assert torch.equal(logits(model), logits(placed))
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.save_pretrained(tmp_path)
    again = tiny("llama")
    for folder in sorted(path for path in tmp_path.iterdir() if path.is_dir()):
        again.load_adapter(folder, folder.name)
    again.set_adapter("arrow_router")
    assert torch.equal(logits(again.eval()), logits(model))


def test_per_call_and_per_row(files: dict[str, Path]) -> None:
    model = model_of(files, top_k=2)
    router = logits(model)
    model.set_adapter("task_1")
    task = logits(model)
    with peftlite.use_adapter(model, "arrow_router"):
        assert torch.equal(logits(model), router)
    with torch.no_grad():
        mixed = model(**batch("llama"), adapter_names=["task_1", "arrow_router"]).logits
    torch.testing.assert_close(mixed, torch.stack([task[0], router[1]]))


def test_copies(files: dict[str, Path]) -> None:
    model = in_place(files, top_k=2)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)


def test_compiled(files: dict[str, Path]) -> None:
    model = in_place(files, top_k=2)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(4, 16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("how", ["copy", "data", "assign"])
def test_directions_follow_the_factors(files: dict[str, Path], how: str) -> None:
    model, other = in_place(files, top_k=1), in_place({**files, "task_0": files["gks_0"]}, top_k=1)
    logits(model)
    expected = logits(other)
    tensors = {name: tensor.clone() for name, tensor in other.state_dict().items() if "task_0" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors and how == "copy":
                parameter.copy_(tensors[name])
            elif name in tensors and how == "data":
                parameter.data = tensors[name]
    if how == "assign":
        model.load_state_dict(tensors, strict=False, assign=True)
    assert torch.equal(logits(model), expected)


# ---- refusals
def test_merging_is_refused(files: dict[str, Path]) -> None:
    model = model_of(files, top_k=2)
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"`arrow_router`.*`arrow_config`"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="`arrow_router`"):
        model.merge_and_unload()
    assert snapshot(model) == before


def test_a_router_whose_adapters_are_gone(files: dict[str, Path]) -> None:
    model = model_of(files, top_k=2)
    logits(model)
    model.delete_adapter("task_1")
    with pytest.raises(StateError, match="`arrow_router` sends tokens to adapter `task_1`"):
        logits(model)


@pytest.mark.parametrize(
    ("tasks", "arrow", "general", "match"),
    [
        ((), {}, (), "`task_specific_adapter_paths` is empty"),
        (("task_0", "task_1"), {"top_k": 3}, (), "`top_k` must be at most 2"),
        (("task_0",), {"top_k": 1, "use_gks": True}, (), "`gks_adapter_names`"),
        (("task_0",), {"top_k": 1}, ("gks_0",), "`gks_adapter_names`"),
        (("task_0", "embedding"), {"top_k": 1}, (), "`task_1` is on `model.embed_tokens`"),
        (("task_0", "dora"), {"top_k": 1}, (), "`task_1` is Dora"),
        (("task_0",), {"top_k": 1, "use_gks": True}, ("rank",), "`use_gks`.*of one rank"),
    ],
)
def test_what_does_not_go_together(
    files: dict[str, Path], tasks: Any, arrow: Any, general: Any, match: str, tmp_path: Path
) -> None:
    own = {
        "embedding": {"target_modules": ["embed_tokens"], "task_type": "CAUSAL_LM"},
        "dora": {"use_dora": True},
        "rank": {"r": 2},
    }
    paths = {name: write(tmp_path / name, 5, **own[name]) for name in own if name in (*tasks, *general)} | files
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises((ConfigError, StateError), match=match) as caught:
        create_arrow_model(model, [paths[n] for n in tasks], ArrowConfig(**arrow), [paths[n] for n in general] or None)
    assert str(caught.value).endswith("Nothing was changed.")
    assert snapshot(model) == before


@pytest.mark.parametrize("fields", [{"top_k": 0}, {"router_temperature": 0.0}, {"use_gks": "yes"}], ids=str)
def test_values_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"`{next(iter(fields))}`"):
        ArrowConfig(**fields)


def test_a_router_needs_names() -> None:
    with pytest.raises(UnsupportedLayerError, match="`create_arrow_model` fills them in"):
        tiny("llama").add_adapter(LoraConfig(**FIELDS, arrow_config=ArrowConfig(top_k=1)))
