"""diffusers: load_lora_weights, set_adapters with weights, fuse, unfuse, hotswap, delete, unload, save."""

from __future__ import annotations

import tempfile
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from small import SPECIAL, WORDS, tokenizer

UNET = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
TEXT = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def pipeline() -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text_config = transformers.CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(WORDS),
        max_position_embeddings=16,
        **SPECIAL,
    )
    made = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=tokenizer(16),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


def image(pipe: Any, **options: Any) -> Any:
    return pipe(
        "w1 w2",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        guidance_scale=1.0,
        height=16,
        width=16,
        **options,
    ).images


def write(directory: str, seed: int, *, text: bool = True) -> Any:
    """A LoRA file as training scripts write it, and what the pipeline drew with it."""
    pipe = pipeline()
    torch.manual_seed(seed)
    pipe.unet.add_adapter(UNET)
    files = {"unet_lora_layers": get_peft_model_state_dict(pipe.unet)}
    if text:
        pipe.text_encoder.add_adapter(TEXT)
        files["text_encoder_lora_layers"] = get_peft_model_state_dict(pipe.text_encoder)
    diffusers.StableDiffusionPipeline.save_lora_weights(directory, **files)
    return image(pipe)


def adapters(first: str, second: str) -> None:
    a, b = write(first, 1), write(second, 2)
    pipe = pipeline()
    plain = image(pipe)
    pipe.load_lora_weights(first, adapter_name="a")
    assert any(isinstance(module, LoraLayer) for module in pipe.unet.modules())
    assert np.array_equal(image(pipe), a)
    pipe.load_lora_weights(second, adapter_name="b")
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["a", "b"]}
    for name, drawn in (("a", a), ("b", b)):
        pipe.set_adapters(name)
        assert pipe.get_active_adapters() == [name]
        assert np.array_equal(image(pipe), drawn)
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    both = image(pipe)
    assert not np.allclose(both, a)
    pipe.fuse_lora(adapter_names=["a", "b"])
    assert np.allclose(image(pipe), both, atol=1e-5)
    pipe.unfuse_lora()
    assert np.array_equal(image(pipe), both)
    pipe.disable_lora()
    assert np.array_equal(image(pipe), plain)
    pipe.enable_lora()
    assert np.array_equal(image(pipe), both)
    assert not np.array_equal(image(pipe, cross_attention_kwargs={"scale": 0.5}), both)
    assert np.array_equal(image(pipe), both)
    pipe.set_adapters("a", 0.0)
    assert np.array_equal(image(pipe), plain)
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {"unet": ["b"], "text_encoder": ["b"]}
    pipe.set_adapters("b")
    assert np.array_equal(image(pipe), b)
    pipe.load_lora_weights(first, adapter_name="a")
    pipe.unload_lora_weights()
    assert not any(isinstance(module, BaseTunerLayer) for module in pipe.unet.modules())
    assert np.array_equal(image(pipe), plain)


def hotswap(first: str, second: str) -> None:
    a, b = write(first, 1, text=False), write(second, 2, text=False)
    pipe = pipeline()
    pipe.load_lora_weights(first, adapter_name="x")
    assert np.array_equal(image(pipe), a)
    layers = [module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)]
    pipe.load_lora_weights(second, adapter_name="x", hotswap=True)
    assert layers == [module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)]
    assert np.array_equal(image(pipe), b)


if __name__ == "__main__":
    for use in (adapters, hotswap):
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            use(one, two)
    print("done")
