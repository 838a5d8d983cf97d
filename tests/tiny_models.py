"""Tiny models built from a config, forms of the adapter, and the adapted weight written out densely from DESIGN.md."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dlor_peft import DLoRConfig, DLoRLayer

VOCABULARY = 40

# tall, wide and square layers in each
TARGETS = {
    "llama": ["q_proj", "k_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wi", "wo"],
}

# every mode, side and diagonal, stacks, and diagonals without a low-rank part
FORMS: dict[str, dict[str, Any]] = {
    "additive": {"mode": "additive"},
    "additive-scalar": {"mode": "additive", "diagonal": "scalar"},
    "additive-none": {"mode": "additive", "diagonal": "none"},
    "additive-r0": {"mode": "additive", "r": 0},
    "scaled": {"mode": "scaled"},
    "scaled-input": {"mode": "scaled", "side": "input"},
    "scaled-output": {"mode": "scaled", "side": "output"},
    "scaled-output-scalar": {"mode": "scaled", "side": "output", "diagonal": "scalar"},
    "scaled-both": {"mode": "scaled", "side": "both"},
    "scaled-both-scalar-r0": {"mode": "scaled", "side": "both", "diagonal": "scalar", "r": 0},
    "scaled-none": {"mode": "scaled", "diagonal": "none"},
    "multiplicative": {"mode": "multiplicative"},
    "multiplicative-input-3": {"mode": "multiplicative", "side": "input", "depth": 3},
    "multiplicative-output-3": {"mode": "multiplicative", "side": "output", "depth": 3},
    "multiplicative-scalar-2": {"mode": "multiplicative", "side": "output", "diagonal": "scalar", "depth": 2},
    "multiplicative-none-2": {"mode": "multiplicative", "side": "input", "diagonal": "none", "depth": 2},
    "multiplicative-r0-2": {"mode": "multiplicative", "r": 0, "depth": 2},
}
FEW_FORMS = ["additive", "scaled-input", "scaled-output-scalar", "scaled-both", "multiplicative-output-3"]


def build(kind: str, seed: int = 0, **config: Any) -> nn.Module:
    """A float32 model in eval mode with random weights, biases included."""
    torch.manual_seed(seed)
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=64, attention_bias=True, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, **config,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
                pad_token_id=0, **config,
            )
        )  # fmt: skip
    elif kind == "bert":
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64, num_labels=3, **config,
            )
        )  # fmt: skip
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
                decoder_start_token_id=0,
                pad_token_id=0, eos_token_id=2, **config,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def inputs(kind: str, rows: int = 3, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, 7), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 5), generator=generator)
    return batch


def config_of(kind: str, form: str = "scaled", **changes: Any) -> DLoRConfig:
    """The config of a form on the targets of a kind of model, started at random rather than as the identity."""
    return DLoRConfig(
        **{"r": 3, "target_modules": list(TARGETS[kind]), "init_weights": False, **FORMS[form], **changes}
    )


def adapted(kind: str, form: str = "scaled", **changes: Any) -> PeftModel:
    """A PeftModel in eval mode whose adapter "default" is not the identity."""
    model = build(kind)
    torch.manual_seed(2)
    return get_peft_model(model, config_of(kind, form, **changes)).eval()


def small(form: str, **changes: Any) -> PeftModel:
    """Two adapted layers, one wide and one tall."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 7))
    return get_peft_model(net, config_of("llama", form, target_modules=["0", "2"], **changes))


def add(model: PeftModel, name: str, kind: str, form: str, seed: int = 3, **changes: Any) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, config_of(kind, form, **changes))
    model.eval()


def logits(model: nn.Module, kind: str, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(kind), **kwargs).logits


def layers(model: nn.Module) -> dict[str, DLoRLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DLoRLayer)}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers(model).items()}


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if "dlor_" not in name}


def adapter_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if "dlor_" in name}


def distance(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest wanted value."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30)).item()


def dense(layer: DLoRLayer, name: str, W: Tensor, mode: str, side: str, scale: float = 1.0) -> Tensor:
    """W' (out_features, in_features) in float64 from the stored tensors, by the table in DESIGN.md section 1."""
    O, I = W.shape
    W = W.double()
    stored = {
        part: getattr(layer, part)[name].weight.detach().double()
        for part in ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")
        if name in getattr(layer, part)
    }
    if side == "auto":
        side = "output" if O < I else "input"

    def diagonal(part: str, k: int, size: int) -> Tensor:
        return stored[part][k].expand(size) if part in stored else torch.zeros(size, dtype=torch.float64)

    def low_rank(k: int) -> Tensor | float:
        return stored["dlor_U"][k] @ stored["dlor_V"][k].T if "dlor_U" in stored else 0.0

    if mode == "additive":
        full = W + low_rank(0)
        full[range(min(O, I)), range(min(O, I))] += diagonal("dlor_diag", 0, min(O, I))
    elif mode == "scaled":
        left = diagonal("dlor_diag", 0, O) if side != "input" else torch.zeros(O, dtype=torch.float64)
        right = diagonal("dlor_diag" if side == "input" else "dlor_diag_in", 0, I)
        full = (1 + left)[:, None] * W * (1 + right) + low_rank(0)
    else:
        size = I if side == "input" else O
        P = torch.eye(size, dtype=torch.float64)
        for k in range(next(iter(stored.values())).shape[0]):
            P = (torch.diag(1 + diagonal("dlor_diag", k, size)) + low_rank(k)) @ P
        full = W @ P if side == "input" else P @ W
    return W + scale * (full - W)
