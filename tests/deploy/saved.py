"""Saved models and adapters for tests of what is done on disk, and the tensors of two folders compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import build, config_of
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dlor_peft import DLoRConfig
from dlor_peft.deploy.adapter import read_adapter
from dlor_peft.deploy.checkpoint import Checkpoint
from dlor_peft.deploy.merge import Merge, MergeOptions


def adapt(base: nn.Module, config: DLoRConfig, folder: Path, seed: int = 2) -> PeftModel:
    """A random adapter on a model that is saved in `folder/base`; the adapter is saved in `folder/adapter`."""
    base.save_pretrained(folder / "base")  # pyright: ignore[reportCallIssue]
    torch.manual_seed(seed)
    model = get_peft_model(base, config).eval()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(str(folder / "adapter"))
    return model


def adapt_tiny(kind: str, form: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    """A tiny model of that kind and an adapter of that form; see tiny_models."""
    return adapt(build(kind).to(dtype), config_of(kind, form, **changes), folder)


def merge(folder: Path, *adapters: str, base: str = "base", out: str = "out", **options: Any) -> dict[str, Any]:
    """Merge saved adapters (`folder/adapter`, or those named) into `folder/base`; what the record says."""
    saved = [read_adapter(folder / name) for name in adapters or ("adapter",)]
    return Merge(Checkpoint(folder / base), saved, MergeOptions(**options)).write(folder / out)


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {key: checkpoint.read(key).clone() for key in checkpoint.specs}


def assert_equal_folders(got: Path, want: Path) -> None:
    """The same names, dtypes, shapes and bits."""
    mine, theirs = tensors(got), tensors(want)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[key].dtype, theirs[key].shape), key
        assert torch.equal(tensor, theirs[key]), key


def write_lora(kind: str, config: LoraConfig, folder: Path, seed: int = 4, std: float = 0.3) -> None:
    """A random LoRA or DoRA of PEFT in `folder/lora`, for a tiny model that is saved in `folder/base`."""
    write_lora_of(build(kind), config, folder, seed, std)


def write_lora_of(base: nn.Module, config: LoraConfig, folder: Path, seed: int = 4, std: float = 0.3) -> PeftModel:
    base.save_pretrained(folder / "base")  # pyright: ignore[reportCallIssue]
    model = get_peft_model(base, config)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=std)
    model.save_pretrained(str(folder / "lora"))
    return model.eval()


def llava() -> LlavaForConditionalGeneration:
    """A tiny model whose tensors have other names in its files than in memory."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
