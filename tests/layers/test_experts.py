"""Experts by name, in mixture-of-experts models from transformers."""

from typing import Any

import pytest
import torch
from formula import (
    PARTS,
    activate,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    bits,
    configure,
    copies,
    layers,
    stacked_formula,
)
from peft import PeftModel, get_peft_model
from tiny_models import FEW_FORMS, FORMS
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SMALL = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXTURES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    ),
    "gpt_oss": (
        GptOssForCausalLM, GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
    "llama4": (
        Llama4ForCausalLM, Llama4TextConfig,
        {"num_local_experts": 4, "intermediate_size_mlp": 12, "interleave_moe_layer_step": 1},
    ),
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 24, (2, 6), generator=torch.Generator().manual_seed(1))


def mixture(kind: str, dtype: torch.dtype = torch.float64, experts: str = "eager") -> PreTrainedModel:
    model_class, config_class, fields = MIXTURES[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SMALL, **fields}))
    model.config._experts_implementation = experts
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def adapt_experts(model: PreTrainedModel, form: str, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, configure(form, target_modules=[], target_parameters=EXPERTS, **changes)).eval()


def expert_weights(model: nn.Module, form: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """W' of every adapted stack of experts by its name in the base model, and the leaves that it is made of."""
    weights, leaves = {}, {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "parameter_name") and layer.__class__.__name__ == "ParamWrapper":
            base = layer.get_base_layer()
            full = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            leaves[full] = copies(layer)
            is_transposed = getattr(base, "is_transposed", False)
            weights[full] = stacked_formula(getattr(base, layer.parameter_name), leaves[full], form, is_transposed)
    return weights, leaves


@pytest.mark.parametrize("form", FEW_FORMS)
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts_follow_the_formula(kind, form):
    model = adapt_experts(mixture(kind), form)
    weights, leaves = expert_weights(model, form)
    assert len(weights) == 4
    y = model(input_ids=IDS).logits
    want = functional_call(mixture(kind), weights, kwargs={"input_ids": IDS}).logits
    assert_close(y, want, 1e-10)
    assert (want - mixture(kind)(input_ids=IDS).logits).abs().max() > 1e-3 * want.abs().max()
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    for name, layer in model.base_model.model.named_modules():
        if layer.__class__.__name__ == "ParamWrapper":
            tensors = leaves[f"{name.replace('.base_layer', '')}.{layer.parameter_name}"]
            assert_same_gradients(layer, tensors, 1e-8)
    plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(mixture(kind).state_dict())
    assert_close(plain(input_ids=IDS).logits, want, 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_grouped_products_take_the_adapted_experts(kind, form):
    """The kernels of torch.nn.functional.grouped_mm ask for a layout that the base has."""
    want = adapt_experts(mixture(kind, torch.float32), form)(input_ids=IDS).logits
    model = adapt_experts(mixture(kind, torch.float32, "grouped_mm"), form)
    y = model(input_ids=IDS).logits
    assert_close(y, want, 1e-4)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_an_expert_without_tokens_is_not_trained(kind, experts):
    model = adapt_experts(mixture(kind, torch.float32, experts), "scaled-both")
    module = next(layer for layer in layers(model) if layer.parameter_name == "down_proj")
    # experts 0 and 3 only
    index = torch.tensor([[0, 3], [3, 0], [0, 3]])
    y = module(torch.randn(3, 16), index, torch.full((3, 2), 0.5))
    y.square().sum().backward()
    for layer in (module, module.base_layer):
        for part in PARTS:
            grad = getattr(layer, part)["default"].weight.grad
            touched = grad.abs().flatten(2).sum((0, 2)) > 0
            assert grad.isfinite().all()
            assert touched.tolist() == [True, False, False, True], (layer.parameter_name, part)


@pytest.mark.parametrize("kind", MIXTURES)
def test_two_adapters_of_a_mixture(kind, tmp_path):
    model = adapt_experts(mixture(kind, torch.float32), "scaled-both")
    first = model(input_ids=IDS).logits
    torch.manual_seed(2)
    model.add_adapter("second", configure("multiplicative-input-3", target_modules=[], target_parameters=EXPERTS, r=2))
    model.eval()
    assert torch.equal(model(input_ids=IDS).logits, first)
    assert len(layers(model)) == 4
    activate(model, "second")
    second = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    for folder, want in ((tmp_path, first), (tmp_path / "second", second)):
        loaded = PeftModel.from_pretrained(mixture(kind, torch.float32), folder)
        assert torch.equal(loaded(input_ids=IDS).logits, want)
    activate(model, "default", "second")
    both, before = model(input_ids=IDS).logits, bits(model)
    model.merge_adapter()
    assert_close(model(input_ids=IDS).logits, both, 1e-4)
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, mixture(kind, torch.float32)(input_ids=IDS).logits)
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=IDS).logits, first)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_mixture_trains_with_gradient_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model = adapt_experts(mixture("mixtral"), "scaled-both").train()
        if checkpointed:
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert_same_bits(*grads)


def test_experts_beside_linear_layers():
    """`target_modules` and `target_parameters` of one adapter."""
    model = get_peft_model(
        mixture("mixtral"), configure("scaled-both", target_modules=["q_proj"], target_parameters=EXPERTS)
    ).eval()
    assert sorted({type(layer).__name__ for layer in layers(model)}) == ["Linear", "ParamWrapper"]
    want = model(input_ids=IDS).logits
    assert_close(model.merge_and_unload()(input_ids=IDS).logits, want, 1e-10)
