"""Activated LoRA: as real PEFT where PEFT is right, in both shapes, with caches, rows, threads and recomputation."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import peftlite
from peftlite import LoraConfig
from peftlite.core.call import current
from peftlite.core.tree import layers
from peftlite.tuners.lora.alora import last_tails
from tests.models import tiny
from tests.versions import checkpointing

TOKENS = [5, 6]
FIELDS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
IDS = torch.tensor(
    [
        [1, 2, 3, 5, 6, 7, 8, 9],  # from the fourth on
        [5, 6, 1, 2, 5, 6, 9, 3],  # from the second occurrence on
        [1, 2, 3, 4, 7, 8, 9, 9],  # never
        [1, 2, 3, 4, 7, 8, 5, 6],
        [5, 6, 1, 1, 1, 1, 6, 5],
        [1, 2, 3, 5, 6, 7, 8, 5],
    ]
)
GENERATE: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def config(library: Any = peftlite, **fields: Any) -> Any:
    return library.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=TOKENS, **{**FIELDS, **fields})


@torch.no_grad()
def fill(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    torch.manual_seed(seed)
    for layer in layers(model):
        for parameter in layer.parameters_of(name):
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """(ours, theirs) with the same weights."""
    ours, theirs = (lib.get_peft_model(tiny("llama"), config(lib)).eval() for lib in (peftlite, peft))
    fill(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def model() -> Any:
    """In place, with an adapter that is invoked, which is active, and a plain one."""
    base = tiny("llama")
    for name, one in (("invoked", config()), ("plain", LoraConfig(**FIELDS))):
        peftlite.inject_adapter_in_model(one, base, name)
        fill(base, name, len(name))
    peftlite.set_adapter(base, "invoked")
    return base


def greedy(model: Any, ids: Tensor, steps: int) -> Tensor:
    """What generation means: the whole sequence once more for each token, invoked from where the prompt says."""
    tails = last_tails(ids, TOKENS)
    for step in range(steps):
        offsets = [int(tail) + step if tail else None for tail in tails]
        logits = model(ids, alora_offsets=offsets, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def test_outputs_and_gradients_are_peft_s(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert repr(ours.base_model.model) == repr(theirs.base_model.model)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    offsets = [3, None, 2, None, 5, 0]
    expected = theirs(IDS, alora_offsets=offsets).logits
    torch.testing.assert_close(ours(IDS, alora_offsets=offsets).logits, expected)
    for model in pair:
        model(IDS, labels=IDS).loss.backward()
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_what_comes_before_the_invocation_is_the_base_model_s(pair: tuple[Any, Any]) -> None:
    base, (ours, _) = tiny("llama"), pair
    before, after = base(IDS).logits, ours(IDS).logits
    for row, tail in enumerate(last_tails(IDS, TOKENS)):
        first = IDS.shape[1] - int(tail)
        assert torch.equal(after[row, :first], before[row, :first])
        assert not tail or (after[row, first:] - before[row, first:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
def test_generation_continues_what_the_prompt_invoked(pair: tuple[Any, Any], use_cache: bool) -> None:
    ours, theirs = pair
    expected = greedy(ours, IDS, 6)
    assert torch.equal(ours.generate(input_ids=IDS, use_cache=use_cache, **GENERATE), expected)
    assert torch.equal(ours.unwrap().generate(input_ids=IDS, use_cache=use_cache, **GENERATE), expected)
    if use_cache:  # without, PEFT's invocation moves along by a token each step
        assert torch.equal(theirs.generate(input_ids=IDS, **GENERATE), expected)


def test_beams_share_their_prompt_s_invocation(pair: tuple[Any, Any]) -> None:
    ours, _ = pair
    beams = {name: ours.generate(input_ids=IDS, num_beams=2, use_cache=name, **GENERATE) for name in (True, False)}
    assert torch.equal(beams[True], beams[False])


def test_a_turn_that_continues_a_cache_may_invoke(model: Any) -> None:
    with torch.no_grad():
        whole = model(IDS[:1]).logits
        start = model(IDS[:1, :3], use_cache=True)
        turn = model(IDS[:1, 3:6], past_key_values=start.past_key_values, use_cache=True)
        last = model(IDS[:1, 6:], past_key_values=turn.past_key_values, use_cache=True)
    pieces = torch.cat([start.logits, turn.logits, last.logits], 1)
    torch.testing.assert_close(pieces, whole)


def test_rows_of_other_adapters(model: Any) -> None:
    alone = {}
    for name in ("invoked", "plain"):
        with peftlite.use_adapter(model, name):
            alone[name] = model(IDS).logits
    with peftlite.disable_adapter(model):
        alone["__base__"] = model(IDS).logits
    names = ["plain", "invoked", "__base__", "invoked", "plain", "invoked"]
    mixed = model(IDS, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row])


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "nonreentrant"])
def test_recomputation_sees_the_tokens_of_its_own_call(model: Any, reentrant: bool) -> None:
    model.train()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.enable_input_require_grads()
            checkpointing(model, {"use_reentrant": reentrant})
        losses = [model(ids, labels=ids, use_cache=False).loss for ids in (IDS, IDS.flip(0))]
        sum(losses).backward()  # type: ignore[union-attr]
        gradients.append([p.grad for layer in layers(model) for p in layer.parameters_of("invoked")])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_threads_see_the_tokens_of_their_own_calls(model: Any) -> None:
    batches = [IDS[row : row + 1] for row in range(len(IDS))]
    with torch.no_grad():
        expected = [model(ids).logits for ids in batches]
    wrong: list[int] = []

    def work(row: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.allclose(model(batches[row]).logits, expected[row], atol=1e-5):
                    wrong.append(row)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_compile_and_nothing_stays_behind(model: Any) -> None:
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, expected)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(IDS, use_cache=False).logits
    torch.testing.assert_close(compiled, expected)
    with pytest.raises(peftlite.errors.StateError, match="1 entries for 6 rows"):
        model(IDS, alora_offsets=[1])
    assert current() is None
    assert torch.equal(model(IDS).logits, expected)
    peftlite.unload(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_hooks_always_called


def test_what_cannot_be_known_or_merged_is_said(model: Any) -> None:
    with pytest.raises(peftlite.errors.StateError, match="call the whole model"):
        model.model(IDS)
    with pytest.raises(peftlite.errors.MergeError, match="alora_invocation_tokens"):
        peftlite.merge_adapter(model)
    with pytest.warns(peftlite.errors.PeftliteWarning, match="`inputs_embeds`"):
        logits = model(inputs_embeds=model.get_input_embeddings()(IDS)).logits
    with peftlite.disable_adapter(model):
        assert torch.equal(logits, model(IDS).logits)


def test_a_beginning_away_from_zero_is_subtracted_only_where_invoked() -> None:
    base, model = tiny("llama"), tiny("llama")
    peftlite.inject_adapter_in_model(config(init_lora_weights="pissa"), model)
    assert torch.equal(model(IDS).logits, base(IDS).logits)  # PEFT's residual in the base changes all tokens


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"target_modules": ["embed_tokens"]}, peftlite.errors.UnsupportedLayerError),
        ({"use_dora": True}, peftlite.errors.ConfigError),
        ({"task_type": "SEQ_2_SEQ_LM"}, peftlite.errors.ConfigError),
        ({"alora_invocation_tokens": ["<go>"]}, peftlite.errors.ConfigError),
    ],
)
def test_what_has_no_form_is_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="alora_invocation_tokens"):
        peftlite.plan(tiny("llama"), LoraConfig(**{**FIELDS, "alora_invocation_tokens": TOKENS, **fields}))


def test_last_occurrence() -> None:
    assert last_tails(IDS, TOKENS).tolist() == [5, 4, 0, 2, 8, 5]
    assert last_tails(IDS[:, :1], TOKENS).tolist() == [0] * 6
    assert last_tails(torch.tensor([[7, 7, 7]]), [7, 7]).tolist() == [2]
