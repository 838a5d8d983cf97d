"""DLoR over quantised bases: what it computes, how it trains, what it keeps. A missing library skips its cases."""

import gc

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantised_models import (
    ALL,
    FORMS,
    MERGING,
    TRAINING,
    adapted,
    config_of,
    contents,
    dense_weights,
    differences,
    logits,
    loss,
    quantised,
    weights,
)
from safetensors.torch import load_file
from tiny_models import distance
from torch import nn

# PEFT's prepare_model_for_kbit_training calls it by the name that older versions of transformers have
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@pytest.mark.parametrize("backend", ALL)
def test_every_layer_says_how_it_is_quantised(backend, checkpoints):
    model = get_peft_model(backend(checkpoints), config_of())
    found = quantised(model).values()
    assert len(found) in (4, 8)  # with or without the first decoder layer
    assert {layer.quantization_backend.backend_name for layer in found} == {backend.name}
    assert all(f"quantization_backend='{backend.name}'" in repr(layer) for layer in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ALL)
def test_starts_as_the_quantised_base(backend, form, checkpoints):
    """To the last bit, also behind a bias, in bfloat16."""
    base = backend(checkpoints, torch.bfloat16).train()
    want = logits(base)
    model = get_peft_model(base, config_of(form, layers_to_transform=[1])).train()
    assert torch.equal(logits(model), want)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("dlor_" in name for name in trainable)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", TRAINING)
def test_trains_and_leaves_the_quantised_weights_alone(backend, form, checkpoints):
    model = get_peft_model(backend(checkpoints), config_of(form)).train()
    first = loss(model).item()
    before = {name: contents(layer.get_base_layer()) for name, layer in quantised(model).items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trainable, lr=1e-2)
    for _ in range(4):
        loss(model).backward()
        assert all(parameter.grad is not None for parameter in trainable)
        optimiser.step()
        optimiser.zero_grad()
    assert loss(model).item() < 0.9 * first
    for name, layer in quantised(model).items():
        assert not differences(contents(layer.get_base_layer()), before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", MERGING)
def test_a_layer_computes_with_the_adapted_dequantised_weight(backend, form, dtype, checkpoints):
    """Biases included, in the precision of the base layer itself."""
    model = adapted(backend(checkpoints, dtype), form)
    want = dense_weights(model, form)
    for name, layer in quantised(model).items():
        x = torch.randn(20, layer.in_features, generator=torch.Generator().manual_seed(5)).to(dtype)
        exact = x.double() @ want[name].T + layer.bias.double()
        tolerance = 3e-2 if backend.rounds_activations else {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        with torch.no_grad():
            assert distance(layer(x), exact) < tolerance


@pytest.mark.parametrize("backend", MERGING)
def test_the_dequantised_weight_is_the_one_that_inference_applies(backend, checkpoints):
    """bitsandbytes repacks 4-bit weights in place when a CPU with AVX512-BF16 first calls them for inference."""
    model = adapted(backend(checkpoints)).eval()
    logits(model)
    for layer in quantised(model).values():
        base = layer.get_base_layer()
        with torch.no_grad():
            applied = (base(torch.eye(layer.in_features)) - base.bias).T
        assert distance(layer.get_base_weight(), applied) < 1e-2


def kept(layer, x):
    """What lives on because of a call: the number of float tensors as large as the weight, and of floats per token."""
    rows, size = x.shape[1], layer.in_features * layer.out_features
    layer(x).sum().backward()  # what is made once is not counted
    saved = {}

    def pack(tensor):
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.numel() % rows == 0:
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel() // rows
        return tensor

    gc.freeze()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        gc.collect()
        new = [tensor for tensor in gc.get_objects() if type(tensor) in (torch.Tensor, nn.Parameter)]
    finally:
        gc.unfreeze()
    copies = {tensor.data_ptr() for tensor in new if tensor.is_floating_point() and tensor.numel() == size}
    y.sum().backward()
    return len(copies), sum(saved.values())


@pytest.mark.parametrize("backend", TRAINING)
def test_keeps_no_dequantised_weight(backend, checkpoints):
    """Beyond what the frozen base layer itself keeps there are x V, and x or W x, as over a weight in floats."""
    rows, r, I, O = 53, 4, 64, 128  # 53: no other dimension is a multiple of it
    x = torch.randn(1, rows, I, requires_grad=True)

    def up_proj(form=None):
        model = backend(checkpoints).train()
        model.requires_grad_(False)
        if form is not None:
            model = get_peft_model(model, config_of(form)).base_model.model.train()
        return model.model.layers[1].mlp.up_proj

    copies, floats = kept(up_proj(), x)
    per_token = {
        "additive": I + r,
        "scaled-input": I + r,
        "scaled-output": I + r + O,
        "scaled-both": I + r + O,
        "multiplicative-input": I + 2 * r,
        "multiplicative-output": O + 2 * r,
    }
    for form, more in per_token.items():
        got_copies, got_floats = kept(up_proj(form), x)
        assert got_copies == copies, form
        assert got_floats <= floats + more, form


@pytest.mark.parametrize("backend", TRAINING)
def test_gradient_checkpointing_gives_the_same_gradient(backend, checkpoints):
    gradients = []
    for checkpointing in (False, True):
        model = adapted(backend(checkpoints), "multiplicative-output")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss(model).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for got, want in zip(*gradients, strict=True):
        assert distance(got, want) < 1e-5


@pytest.mark.parametrize("backend", TRAINING)
def test_the_usual_preparation_for_training(backend, checkpoints):
    base = prepare_model_for_kbit_training(
        backend(checkpoints, torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    model = get_peft_model(base, config_of()).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    loss(model).backward()
    assert all(parameter.grad is not None for parameter in trainable)


@pytest.mark.parametrize("backend", ALL)
def test_the_saved_adapter_loads_onto_the_quantised_base(backend, checkpoints, tmp_path):
    model = adapted(backend(checkpoints), "scaled-output")
    model.save_pretrained(tmp_path)
    assert all(".dlor_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(backend(checkpoints), tmp_path).train()
    assert distance(logits(loaded), logits(model)) == 0


def is_dequantised(model):
    try:
        return bool(weights(model))
    except (NotImplementedError, TypeError):
        return False


@pytest.mark.parametrize("backend", ALL)
def test_a_start_from_the_weights_needs_them_dequantised(backend, checkpoints):
    """What the backend cannot give back is refused, and the base left as it was."""
    base = backend(checkpoints).train()
    want = logits(base)
    if not is_dequantised(get_peft_model(backend(checkpoints), config_of())):
        with pytest.raises(ValueError, match=r"cannot be dequantised.*Use init_weights=True"):
            get_peft_model(base, config_of(init_weights="svd"))
        assert torch.equal(logits(base), want)
        return
    model = get_peft_model(base, config_of(init_weights="svd")).train()
    assert torch.equal(logits(model), want)
    for layer in quantised(model).values():
        W, V = layer.get_base_weight().float(), layer.dlor_V["default"].weight[0]
        best = torch.linalg.svdvals(W)[: V.shape[1]].square().sum() / 3
        assert (W @ V).square().sum() > 0.999 * best
