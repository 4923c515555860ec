"""The tiny models that every other test stands on."""

from __future__ import annotations

import pytest
import torch

from tests.models import TINY, batch, tiny


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_small_in_eval_mode_and_the_same_every_time(name: str) -> None:
    before = torch.random.get_rng_state()
    model, again, other = tiny(name), tiny(name), tiny(name, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 1_000 < sum(p.numel() for p in model.parameters()) < 20_000
    assert not any(module.training for module in model.modules())
    state, twin, stranger = model.state_dict(), again.state_dict(), other.state_dict()
    assert all(torch.equal(state[key], twin[key]) for key in state)
    assert any(not torch.equal(state[key], stranger[key]) for key in state)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_takes_its_batch_and_returns_a_loss(name: str) -> None:
    loss = tiny(name)(**batch(name)).loss
    assert loss.dim() == 0
    assert torch.isfinite(loss)


def test_sizes_and_dtype_can_be_set() -> None:
    model = tiny("llama", dtype=torch.bfloat16, hidden_size=32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight.shape[1] == 32
