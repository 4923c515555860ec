"""accelerate: prepare, save_state, load_state, and a model that is partly on disk."""

from __future__ import annotations

import tempfile

import torch
from accelerate import Accelerator, cpu_offload, disk_offload
from accelerate.utils import is_peft_available, is_peft_model
from peft import LoraConfig, get_peft_model
from small import llama

TOKENS = torch.arange(4, 12)[None]
CONFIG = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def training(directory: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = get_peft_model(llama(), CONFIG)
    assert is_peft_available()
    assert is_peft_model(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> torch.Tensor:
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()
    accelerator.save_state(directory)
    first = step()
    step()
    accelerator.load_state(directory)
    assert torch.equal(step(), first)
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(directory, state_dict=accelerator.get_state_dict(model))


def offloading(directory: str) -> None:
    torch.manual_seed(1)
    expected = get_peft_model(llama(), CONFIG).eval()
    logits = expected(TOKENS).logits
    cpu_offload(expected, torch.device("cpu"))
    assert torch.equal(expected(TOKENS).logits, logits)
    torch.manual_seed(1)
    on_disk = get_peft_model(llama(), CONFIG).eval()
    disk_offload(on_disk, directory, torch.device("cpu"))
    assert torch.equal(on_disk(TOKENS).logits, logits)


with tempfile.TemporaryDirectory() as scratch:
    training(scratch)
with tempfile.TemporaryDirectory() as scratch:
    offloading(scratch)
print("done")
