"""What the stand-in's run.py needs besides data: the checks of paths and parameters that the harness makes."""

import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = os.path.dirname(__file__)
RESULTS = [os.path.join(HERE, name) for name in ("results", "temporary_results", "cancelled_results")]


@dataclass
class TrainConfig:
    model_id: str
    dtype: str
    max_seq_length: int
    batch_size: int
    batch_size_eval: int
    max_steps: int
    eval_steps: int
    compile: bool
    use_gc: bool
    query_template: str
    seed: int
    grad_norm_clip: float
    optimizer_type: str
    optimizer_kwargs: dict[str, Any]
    lr_scheduler: str | None
    use_amp: bool
    autocast_adapter_dtype: bool
    generation_kwargs: dict[str, Any]
    attn_implementation: str | None
    init_kv_cache_prefix: str | None


def experiment_of(path: str) -> str:
    parts = path.rstrip(os.path.sep).split(os.path.sep)
    if not os.path.exists(path) or len(parts) != 3 or parts[0] != "experiments":
        raise ValueError(f"{path} is not experiments/<method>/<name>")
    return os.path.join(*parts[1:])


def train_config(path: str) -> TrainConfig:
    with open(os.path.join(HERE, "default_training_params.json")) as stream:
        values = json.load(stream)
    if os.path.exists(path):
        with open(path) as stream:
            values |= json.load(stream)
    return TrainConfig(**values)


def branch() -> str:
    command = ["git", "rev-parse", "--abbrev-ref", "HEAD"]
    return subprocess.check_output(command, cwd=os.path.dirname(peft.__file__), text=True).strip()


def base_model() -> LlamaForCausalLM:
    # a byte is a token, 0 pads
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)
