"""What a layer adds to its form: the bias, base layers that are more than their weight, the unloading of wrappers."""

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from tiny_models import build
from torch import nn

from dlor_peft import DLoRConfig

OUTPUT_SIDE = [
    {"mode": "scaled", "side": "output"},
    {"mode": "scaled", "side": "both"},
    {"mode": "multiplicative", "side": "output"},
]


def adapted(config: dict, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8)).to(dtype)
    return get_peft_model(net, DLoRConfig(r=2, target_modules=["0"], init_weights=False, **config))


@pytest.mark.parametrize("config", OUTPUT_SIDE, ids=str)
def test_a_large_bias_costs_the_diagonal_no_digits_in_bfloat16(config):
    model = adapted(config, torch.bfloat16)
    layer = model.base_model.model[0]
    layer.base_layer.bias.data.fill_(200.0)
    x, g = torch.randn(64, 12).bfloat16(), torch.randn(64, 8).bfloat16()
    model(x).backward(g)
    got = layer.dlor_diag["default"].weight.grad.clone()
    reference = adapted(config).double()
    reference.load_state_dict(model.state_dict())
    reference(x.double()).backward(g.double())
    expected = reference.base_model.model[0].dlor_diag["default"].weight.grad
    assert ((got - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("config", OUTPUT_SIDE, ids=str)
def test_a_hooked_base_layer_is_called_and_agrees_with_a_plain_one(config):
    model = adapted(config)
    x = torch.randn(5, 12)
    plain = model(x)
    calls = []
    model.base_model.model[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(x), plain)
    assert calls


@pytest.mark.parametrize("config", [*OUTPUT_SIDE, {"mode": "additive"}], ids=str)
def test_an_offloaded_base_layer_gives_the_same(config):
    model = adapted(config)
    x = torch.randn(5, 12)
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, execution_device="cpu")
        assert model.base_model.model[0].base_layer.bias.is_meta
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_trained_tokens_survive_the_merge(kind):
    model = get_peft_model(
        build(kind), DLoRConfig(trainable_token_indices=[1, 3], init_weights=False, target_modules="all-linear")
    ).eval()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.token_adapter.trainable_tokens_delta["default"].add_(1.0)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_with_adapter_names():
    model = adapted({}).eval()
    assert model.base_model.model[0](torch.randn(0, 12), adapter_names=[]).shape == (0, 8)
