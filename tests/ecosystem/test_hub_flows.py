"""Adapters to the hub and back, over HTTP, by huggingface_hub's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlite import LoraConfig
from tests.ecosystem.flows.small import tokenizer
from tests.ecosystem.hub_server import TOKEN, Hub, Repo, serving
from tests.ecosystem.programs import program
from tests.models import tiny

SETUP = """
    import os, sys, torch, transformers, peftlite
    torch.set_num_threads(1)
    SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    TOKENS = torch.arange(4)[None]

    def base():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()

    def trained(seed=1, **options):
        torch.manual_seed(seed)
        return peftlite.get_peft_model(base(), peftlite.LoraConfig(r=2, init_lora_weights=False, **options)).eval()

    def logits(model):
        return model(TOKENS).logits

    def refused(call, kind, *words):
        try:
            call()
        except kind as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError(f"nothing was refused: {words}")
    """


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as running:
        yield running


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a client whose hub this is."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def test_push_and_load_by_id(hub: Hub, client: dict[str, str]) -> None:
    program(
        SETUP,
        f"""
        TOKEN = {TOKEN!r}
        model = trained()
        model.add_adapter("second", peftlite.LoraConfig(r=3, init_lora_weights=False))
        url = model.push_to_hub("me/adapter", token=TOKEN, private=True, tags=["made-here"])
        assert "/me/adapter/commit/" in url, url
        other = trained(seed=2)
        other.push_to_hub("me/adapter", token=TOKEN, revision="v2")
        place = trained(seed=3).unwrap()
        place.push_to_hub("me/in-place", token=TOKEN)

        EMPTY = os.environ["HF_HOME"] + "-empty"
        load = peftlite.PeftModel.from_pretrained
        assert torch.equal(logits(load(base(), "me/adapter", token=TOKEN)), logits(model))
        assert torch.equal(logits(load(base(), "me/adapter", token=TOKEN, revision="v2")), logits(other))
        model.set_adapter("second")
        assert torch.equal(logits(load(base(), "me/adapter", token=TOKEN, subfolder="second")), logits(model))
        assert torch.equal(logits(load(base(), "me/in-place")), logits(place))
        again = base()
        again.load_adapter("me/in-place")
        assert torch.equal(logits(again), logits(place))
        assert peftlite.PeftConfig.from_pretrained("me/adapter", subfolder="second", token=TOKEN).r == 3

        Refused = peftlite.errors.CheckpointError
        refused(lambda: load(base(), "me/adapter", cache_dir=EMPTY), OSError, "`token`")
        refused(lambda: load(base(), "me/none", token=TOKEN), OSError, "no such repository")
        refused(lambda: load(base(), "me/adapter", token="hf_wrong", cache_dir=EMPTY), Refused, "me/adapter")
        refused(lambda: load(base(), "me/adapter", token=TOKEN, revision="v9"), OSError, "no such `revision`")
        refused(lambda: load(base(), "me/adapter", token=TOKEN, subfolder="third"), OSError, "adapter_config.json")
        refused(lambda: model.push_to_hub("me/adapter", token="hf_wrong"), Refused, "pushed")
        """,
        **client,
    )
    first = hub.repos["me/adapter"]
    assert first.private
    files = first.commits[first.refs["main"]]
    names = {"adapter_config.json", "adapter_model.safetensors", "peftlite.json"}
    assert set(files) - {".gitattributes"} == {"README.md", *names, *(f"second/{name}" for name in names)}
    assert b"made-here" in files["README.md"]


def test_cache_offline_and_downloads_that_break_off(hub: Hub, client: dict[str, str], tmp_path: Path) -> None:
    program(SETUP, f"trained().save_pretrained({str(tmp_path / 'made')!r})", **client)
    repo = hub.repos["some/adapter"] = Repo()
    repo.commit("main", {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()})
    hub.cut.add("adapter_model.safetensors")
    load = """
        model = peftlite.PeftModel.from_pretrained(base(), "some/adapter")
        assert torch.equal(logits(model), logits(trained()))
        """
    once_more = """
        import huggingface_hub
        if int(huggingface_hub.__version__.split(".")[0]) < 1:  # it resumes when it is asked again
            refused(lambda: peftlite.PeftModel.from_pretrained(base(), "some/adapter"),
                    peftlite.errors.CheckpointError, "could not be fetched", "Nothing was changed")
        """
    program(SETUP, once_more, load, **client)
    assert not hub.cut
    downloads = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    program(SETUP, load, **client)
    again = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert again == downloads
    asked = len(hub.requests)
    program(
        SETUP,
        load,
        """
        refused(
            lambda: peftlite.PeftModel.from_pretrained(base(), "some/other"), OSError, "not in the cache", "offline"
        )
        """,
        **{**client, "HF_HUB_OFFLINE": "1"},
    )
    assert len(hub.requests) == asked


def test_the_trainer_pushes_both_shapes(hub: Hub, client: dict[str, str], tmp_path: Path) -> None:
    program(
        SETUP,
        f"""
        from transformers import Trainer, TrainingArguments

        def push(name, model):
            args = TrainingArguments(
                {str(tmp_path)!r} + "/" + name, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                disable_tqdm=True, push_to_hub=True, hub_token={TOKEN!r}, hub_model_id=f"me/{{name}}",
            )
            rows = [{{"input_ids": TOKENS[0], "labels": TOKENS[0]}}] * 2
            trainer = Trainer(model=model, args=args, train_dataset=rows)
            trainer.train()
            trainer.push_to_hub()
            return logits(model.eval())

        first = push("wrapped", trained())
        assert torch.equal(first, push("in-place", trained().unwrap()))
        for name in ("wrapped", "in-place"):
            assert torch.equal(logits(peftlite.PeftModel.from_pretrained(base(), f"me/{{name}}")), first)
        """,
        **client,
    )
    for name in ("wrapped", "in-place"):
        repo = hub.repos[f"me/{name}"]
        files = set(repo.commits[repo.refs["main"]])
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "training_args.bin"} <= files
        assert not {"model.safetensors", "config.json"} & files


def test_the_id_of_an_adapter_is_enough(hub: Hub, client: dict[str, str], tmp_path: Path) -> None:
    """The base model is another repository, which the adapter names, with commits of its own."""
    model: Any = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(base_model_name_or_path="some/base", task_type="CAUSAL_LM"))
    for name in ("1", "2"):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        model.save_pretrained(tmp_path / name)
    files = {
        name: {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("base", "1", "2")
    }
    hub.repos.update({"some/base": Repo(), "some/adapter": Repo()})
    hub.repos["some/base"].commit("main", files["base"])
    hub.repos["some/adapter"].commit("main", files["1"])
    hub.repos["some/adapter"].commit("v2", files["2"])
    model.resize_token_embeddings(52)
    tokens = tokenizer()
    tokens.add_tokens(["a", "b", "c", "d"])
    for part in (model, tokens):
        part.save_pretrained(tmp_path / "grown")
    hub.repos["some/adapter"].commit("grown", {file.name: file.read_bytes() for file in (tmp_path / "grown").iterdir()})
    program(
        SETUP,
        f"""
        def loaded(kind, name="some/adapter", **options):
            return logits(kind.from_pretrained(name, **options).eval())

        Base = transformers.LlamaForCausalLM.from_pretrained("some/base")
        Base.load_adapter({str(tmp_path / "1")!r})
        expected = logits(Base)
        kinds = (
            peftlite.AutoPeftModelForCausalLM, peftlite.AutoPeftModel,
            transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM,
        )
        for kind in kinds:
            assert torch.equal(expected, loaded(kind)), kind
        second = loaded(peftlite.AutoPeftModel, revision="v2")
        assert not torch.equal(expected, second)
        for kind in kinds[2:]:
            assert torch.equal(second, loaded(kind, adapter_kwargs={{"revision": "v2"}}))
        from_hub = loaded(peftlite.AutoPeftModel, revision="grown")
        assert from_hub.shape[-1] == 52
        assert torch.equal(from_hub, loaded(peftlite.AutoPeftModel, {str(tmp_path / "grown")!r}))
        refused(lambda: loaded(peftlite.AutoPeftModelForSeq2SeqLM), peftlite.errors.ConfigError, "CAUSAL_LM")
        """,
        **client,
    )
