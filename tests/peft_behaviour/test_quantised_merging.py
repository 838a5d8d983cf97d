"""Merging DLoR into quantised bases.

What a merge must be is known without the code that merges: the adapted weight W' of every layer, written out densely
from the dequantised W and put into the unquantised model, quantised by the library as it loads that model. So the
merged output is the adapted output up to the error of quantising W' once.
"""

import pytest
import torch
from peft import get_peft_model
from quantised_models import (
    MERGING,
    REFUSING,
    adapted,
    config_of,
    contents,
    dense_weights,
    differences,
    logits,
    quantised,
    weights,
)
from tiny_models import distance, layers
from transformers import AutoModelForCausalLM, LlamaForCausalLM


@pytest.mark.parametrize("form", ["additive", "scaled-input", "scaled-both", "multiplicative-output"])
@pytest.mark.parametrize("backend", MERGING)
def test_merging_is_quantising_the_adapted_weight(backend, form, checkpoints, tmp_path):
    model = adapted(backend(checkpoints), form)
    before, want, W = logits(model), dense_weights(model, form), weights(model)
    unquantised = LlamaForCausalLM.from_pretrained(checkpoints[True])
    error_of_base = distance(logits(backend(checkpoints).train()), logits(unquantised))
    parameters = dict(unquantised.named_parameters())
    for name, layer in quantised(model).items():
        assert distance(layer.get_delta_weight("default"), want[name] - W[name]) < 1e-5
        parameters[name.removeprefix("base_model.model.") + ".weight"].data.copy_(want[name])
    unquantised.save_pretrained(tmp_path)
    expected = get_peft_model(backend.from_folder(tmp_path), config_of()).train()

    model.merge_adapter()
    merged, exact = weights(model), weights(expected)
    for name in want:
        # W' in float32 and in float64: on the border between two steps they may round apart
        assert (merged[name] - exact[name]).abs().gt(1e-5).double().mean() < 1e-2
        assert (merged[name] - want[name]).norm() < 1.01 * (exact[name] - want[name]).norm()
    assert distance(logits(model), logits(expected)) < 3e-2
    assert distance(logits(model), before) < 2 * error_of_base


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("inference_first", [False, True])
@pytest.mark.parametrize("backend", MERGING)
def test_unmerge_restores_every_bit_after_two_merges(backend, inference_first, checkpoints):
    model = adapted(backend(checkpoints))
    model.add_adapter("second", config_of("multiplicative-input", init_weights=False))
    model.train(not inference_first)
    want = logits(model)
    before = {name: contents(layer.get_base_layer()) for name, layer in quantised(model).items()}
    base_layers = {name: layer.get_base_layer() for name, layer in quantised(model).items()}
    biases = {name: layer.bias.clone() for name, layer in quantised(model).items()}
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert not torch.equal(logits(model), want)
    for name, layer in quantised(model).items():
        assert differences(contents(layer.get_base_layer()), before[name])
        assert torch.equal(layer.bias, biases[name])
    model.unmerge_adapter()
    for name, layer in quantised(model).items():
        assert layer.get_base_layer() is base_layers[name]
        assert not differences(contents(layer.get_base_layer()), before[name])
    assert torch.equal(logits(model), want)


@pytest.mark.parametrize("backend", MERGING)
def test_merging_after_inference(backend, checkpoints):
    """Evaluate, then merge, then evaluate: what was computed before the merge is not forgotten by it."""
    model = adapted(backend(checkpoints)).eval()
    before, base = logits(model), logits(LlamaForCausalLM.from_pretrained(checkpoints[True]))
    error_of_base = distance(logits(backend(checkpoints).eval()), base)
    model.merge_adapter()
    assert distance(logits(model), before) < 2 * error_of_base


@pytest.mark.parametrize("backend", MERGING)
def test_unmerging_in_another_mode_keeps_the_mode(backend, checkpoints):
    model = adapted(backend(checkpoints))
    model.merge_adapter()
    model.eval()
    assert not any(module.training for module in model.modules())
    model.unmerge_adapter()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("backend", MERGING)
def test_merge_and_unload_gives_back_the_layers_of_the_library(backend, checkpoints, tmp_path):
    kinds = {name: type(module) for name, module in backend(checkpoints).named_modules()}
    model = adapted(backend(checkpoints))
    model.merge_adapter(safe_merge=True)
    want = logits(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert {name: type(module) for name, module in plain.named_modules()} == kinds
    assert torch.equal(logits(plain), want)
    if backend.name != "hqq":  # transformers 5.23 loads no checkpoint of HQQ
        plain.save_pretrained(tmp_path)
        assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path).train()), want) < 1e-5


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("backend", REFUSING)
def test_a_refused_merge_changes_nothing(backend, method, checkpoints):
    """Not even the layers before the first that refuses, which could have been merged."""
    model = adapted(backend(checkpoints)).eval()
    want = logits(model)
    before = {name: contents(layer.get_base_layer()) for name, layer in layers(model).items()}
    with pytest.raises(ValueError, match=rf"quantised by {backend.name}.*Load the adapter on the unquantised base"):
        getattr(model, method)()
    assert layers(model).keys() == before.keys()
    for name, layer in layers(model).items():
        assert not layer.merged
        assert not differences(contents(layer.get_base_layer()), before[name])
    assert torch.equal(logits(model), want)
    with pytest.raises(ValueError, match=f"quantised by {backend.name}"):
        next(iter(quantised(model).values())).merge()


@pytest.mark.parametrize("backend", MERGING)
def test_a_weight_that_cannot_be_written_leaves_the_layer_as_it_was(backend, checkpoints, monkeypatch):
    """A library that fails half way, after the backend has taken the weight out of the layer."""
    model = adapted(backend(checkpoints))
    want = logits(model)
    layer = next(iter(quantised(model).values()))
    before = contents(layer.get_base_layer())

    def fail(owner, W):
        base = owner.get_base_layer()
        if "weight" in base._parameters:
            del base.weight
            base.weight = W
        raise RuntimeError("out of memory")

    monkeypatch.setattr(layer.quantization_backend, "set_base_weight", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layer.merge()
    assert not layer.merged
    assert not differences(contents(layer.get_base_layer()), before)
    assert torch.equal(logits(model), want)
