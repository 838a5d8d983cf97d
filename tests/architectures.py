"""The architectures that PEFT's tables of default targets name: for each a tiny model from its config, and a batch."""

from __future__ import annotations

import inspect
from typing import Any

import peft.utils.constants
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

NAMED = sorted(
    {
        model_type
        for table, entries in vars(peft.utils.constants).items()
        if table.startswith("TRANSFORMERS_MODELS_TO_")
        for model_type in entries
    }
)
ABSENT = [model_type for model_type in NAMED if model_type not in CONFIG_MAPPING]
BUILT = [model_type for model_type in NAMED if model_type in CONFIG_MAPPING]

# what an architecture is for comes first: some encoders and encoder-decoders have a head for causal language modelling
HEADS = (
    AutoModelForSeq2SeqLM,
    AutoModelForImageTextToText,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForCausalLM,
)

VOCABULARY = 48
IMAGE_TOKEN = VOCABULARY - 1
NUM_IMAGE_TOKENS = 4
IMAGE_SIZE = 8
NUM_CHANNELS = 3

FIELDS: list[tuple[int, str]] = [
    (16, "hidden_size d_model n_embd embedding_size word_embed_proj_dim attention_hidden_size encoder_hidden_size"),
    (16, "pooler_hidden_size pooler_output_size image_text_hidden_size"),
    (16, "projector_input_dim projector_output_dim vision_output_dim"),
    (24, "intermediate_size intermediate_size_mlp moe_intermediate_size moe_shared_expert_intermediate_size"),
    (24, "ffn_dim d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim"),
    (2, "num_hidden_layers num_layers num_decoder_layers n_layer n_layers encoder_layers decoder_layers"),
    (2, "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads"),
    (1, "num_key_value_heads num_kv_heads"),
    (8, "head_dim d_kv rotary_dim"),
    (4, "num_local_experts n_routed_experts num_experts"),
    (4, "mamba_num_heads ssm_state_size chunk_size"),
    (8, "mamba_head_dim"),
    (2, "n_groups type_vocab_size"),
    (4, "patch_size hidden_size_per_layer_input"),
    (64, "max_position_embeddings max_2d_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (IMAGE_SIZE, "image_size"),
    (NUM_CHANNELS, "num_channels"),
    (NUM_IMAGE_TOKENS, "num_query_tokens"),
]
TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "image_token_index": IMAGE_TOKEN,
    "image_token_id": IMAGE_TOKEN,
}
SMALL = TOKENS | {name: size for size, names in FIELDS for name in names.split()}

# what the fields do not settle; under the name of a nested config, what they do not settle there
OVERRIDES: dict[str, dict[str, Any]] = {
    # its fused projection has four parts, each with a whole number of heads
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "gemma4": {
        "text_config": {"global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": {"patch_size": 2, "pooling_kernel_size": 2, "position_embedding_size": 4},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # the vision adapter takes two by two patches of 16 at once
    "llama4": {"vision_config": {"patch_size": 2, "intermediate_size": 64}},
    # None by default, and then not among the fields of the default config
    "t5": {"decoder_start_token_id": 0},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_shrunk(config_class(), OVERRIDES.get(model_type, {}) | changes))


def build(model_type: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A float32 model in eval mode with random weights, biases included; the same seed gives the same model."""
    small = tiny_config(model_type, **config)
    head = next(head for head in HEADS if type(small) in head._model_mapping)
    torch.manual_seed(seed)
    model = head.from_config(small)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def batch(model: PreTrainedModel, rows: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Inputs with labels, from which the model computes its own loss."""
    generator = torch.Generator().manual_seed(seed)
    taken = inspect.signature(model.forward).parameters
    inputs = {}
    if "pixel_values" in taken:
        inputs["pixel_values"] = torch.randn(rows, NUM_CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    if "image_position_ids" in taken:
        # such a model takes patches, each with its place
        size = model.config.vision_config.patch_size
        inputs["pixel_values"] = nn.functional.unfold(inputs["pixel_values"], size, stride=size).mT
        edge = torch.arange(IMAGE_SIZE // size)
        inputs["image_position_ids"] = torch.cartesian_prod(edge, edge).expand(rows, -1, -1)
    if "input_ids" not in taken:
        return inputs | {"labels": torch.arange(rows) % model.config.num_labels}
    ids = torch.randint(3, IMAGE_TOKEN, (rows, 7), generator=generator)
    if inputs:
        ids[:, 1 : 1 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _shrunk(default: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    fields = {name: SMALL[name] for name in default.to_dict() if name in SMALL}
    for name, config_class in default.sub_configs.items():
        nested = getattr(default, name)
        if nested is None and name in overrides:
            nested = config_class()
        if isinstance(nested, PreTrainedConfig):
            fields[name] = _shrunk(nested, overrides.get(name, {})) | {"model_type": nested.model_type}
    return fields | {name: value for name, value in overrides.items() if name not in default.sub_configs}
