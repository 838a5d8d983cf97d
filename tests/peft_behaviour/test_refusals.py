"""What is refused changes nothing, however far it came."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from tiny_models import adapted, build, config_of, distance, layers, logits
from torch import nn

from dlor_peft import DLoRConfig, DLoRLayer


class Net(nn.Module):
    """The embedding is refused on the input side, after the layers before it were adapted."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.experts = nn.Module()
        self.experts.first, self.experts.second = (nn.Parameter(torch.randn(2, 3, 4)) for _ in range(2))
        self.emb = nn.Embedding(5, 4)

    def forward(self, x):
        return self.lin(x)


REFUSED = {"target_modules": ["lin", "attention", "emb"], "side": "input"}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("make", [get_peft_model, lambda model, config: inject_adapter_in_model(config, model)])
def test_the_first_adapter(make):
    model = Net()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="the input features of an embedding are its tokens"):
        make(model, DLoRConfig(**REFUSED))
    assert dict(model.named_modules()) == before
    again = get_peft_model(model, DLoRConfig(target_modules=["lin"]))
    assert trainable(again) == {f"base_model.model.lin.dlor_{part}.default.weight" for part in ("diag", "U", "V")}


def test_nested_parameters():
    model = Net()
    # of three dimensions are experts, and a vector is none
    model.experts.third = nn.Parameter(torch.randn(4))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="'third' has the shape"):
        get_peft_model(model, DLoRConfig(target_parameters=["experts.first", "experts.second", "experts.third"]))
    assert dict(model.named_modules()) == before


def test_a_further_adapter():
    model = get_peft_model(Net(), DLoRConfig(target_modules=["lin"], init_weights=False))
    state, before, trained = model.state_dict(), dict(model.named_modules()), trainable(model)
    with pytest.raises(ValueError, match="the input features of an embedding are its tokens"):
        model.add_adapter("second", DLoRConfig(**REFUSED))
    assert dict(model.named_modules()) == before
    assert list(model.state_dict()) == list(state)
    assert trainable(model) == trained
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.form) == ["default"] for layer in layers(model).values())


def test_a_name_that_stands_for_no_adapter():
    with pytest.raises(ValueError, match=r"__base__.*Choose another"):
        get_peft_model(Net(), DLoRConfig(target_modules=["lin"]), adapter_name="__base__")


def shares_a_weight():
    model = build("llama", tie_word_embeddings=True)
    config = config_of("llama", target_modules=["embed_tokens", "lm_head", "q_proj"])
    return get_peft_model(model, config).eval()


of_one_weight = pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning")


@of_one_weight
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_two_adapters_of_one_weight(safe_merge):
    model = shares_a_weight()
    want, weight = logits(model, "llama"), model.get_base_model().model.embed_tokens.base_layer.weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"embed_tokens.*lm_head.*share one weight.*ensure_weight_tying"):
            merge(safe_merge=safe_merge)
        assert not any(layer.merged for layer in layers(model).values())
        assert torch.equal(logits(model, "llama"), want)
        assert torch.equal(model.get_base_model().lm_head.base_layer.weight, weight)


@of_one_weight
def test_merging_an_adapter_that_has_one_of_the_two():
    model = shares_a_weight()
    model.add_adapter("second", config_of("llama"))
    model.merge_adapter(["second"])
    assert any(layer.merged for layer in layers(model).values())


def test_a_layer_of_another_adapter_does_not_hinder_merging():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.normalised, net.plain = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)
    model = get_peft_model(net, DLoRConfig(target_modules=["normalised"], init_weights=False))
    model.add_adapter("second", DLoRConfig(target_modules=["plain"], init_weights=False))
    model.set_adapter("second")
    x = torch.randn(3, 4)
    want = model(x)
    model.merge_adapter()
    assert distance(model(x), want) < 1e-6
    with pytest.raises(ValueError, match="computed from other tensors"):
        model.merge_adapter(["default"])


def test_backward_hooks_of_a_half_precision_layer_are_called():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)).bfloat16(), DLoRConfig(target_modules=["0"], side="output"))
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, DLoRLayer))
    layer.base_layer.register_full_backward_hook(lambda *args: calls.append(args))
    model(torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert calls


def test_adapted_embeddings_leave_the_dtype_under_autocast():
    for form in ("scaled-output", "multiplicative-output-3", "additive"):
        model = adapted("llama", form, target_modules=["embed_tokens"])
        embedding = model.get_base_model().model.embed_tokens
        ids = torch.arange(6).view(2, 3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got = embedding(ids)
        assert got.dtype == torch.float32
        with torch.no_grad():
            assert distance(got, embedding(ids)) < 1e-2
