"""torch.export: a program of plain operations, for batches of any size, that answers as the adapted model does."""

import io

import pytest
import torch
from tiny_models import FORMS, adapted, adapter_parameters, config_of, distance, inputs, layers, small
from torch.export import Dim, export, load, save

pytestmark = [
    # Dynamo makes an instance of every autograd.Function that it traces
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # torch.export decomposes through a function that torch itself has deprecated
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # transformers collects hidden states in a global
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
    # torch 2.11 reads the file's bytes as a buffer
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
few_forms = pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
ROWS, TOKENS = Dim("rows", min=2, max=32), Dim("tokens", min=2, max=32)


def exported(model, strict=False):
    # a PeftModel takes any arguments, so that their shapes cannot be named
    net, example = model.get_base_model(), (torch.randn(3, 5, 6),)
    return export(net, example, dynamic_shapes=({0: ROWS, 1: TOKENS},), strict=strict)


def libraries(program):
    """Of the operations that the program consists of."""
    return {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    model = small(form).eval()
    program = exported(model)
    for shape in [(3, 5, 6), (8, 2, 6)]:
        x = torch.randn(shape)
        assert distance(program.module()(x), model(x)) < 1e-6
    # so that it runs where this package is not installed
    assert libraries(program) == {"aten"}


@few_forms
def test_strict(form):
    model = small(form).eval()
    x = torch.randn(8, 2, 6)
    assert distance(exported(model, strict=True).module()(x), model(x)) < 1e-6


@few_forms
def test_the_program_trains(form):
    model = small(form).eval()
    program = exported(model).module()
    x = torch.randn(2, 4, 6)
    for one in (model, program):
        one(x).square().mean().backward()
    got = adapter_parameters(program)
    for name, parameter in adapter_parameters(model.get_base_model()).items():
        assert distance(got[name].grad, parameter.grad) < 1e-5, name


@pytest.mark.parametrize("scale", [0.5, 0.0])
@pytest.mark.parametrize("form", ["scaled-both", "multiplicative-output-3"])
def test_the_scale_is_a_constant_of_the_program(form, scale):
    model = small(form).eval()
    for layer in layers(model).values():
        layer.set_scale("default", scale)
    x = torch.randn(2, 4, 6)
    assert distance(exported(model).module()(x), model(x)) < 1e-6


def test_several_adapters_half_precision_and_autocast():
    model = small("scaled-both")
    model.add_adapter("second", config_of("llama", "multiplicative-output-3", target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    x = torch.randn(2, 4, 6)
    assert distance(exported(model).module()(x), model(x)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(exported(model).module()(x), model(x)) < 2e-2
    for layer in layers(model).values():
        layer.base_layer.to(torch.bfloat16)
    program = export(model.get_base_model(), (x.bfloat16(),))
    assert distance(program.module()(x.bfloat16()), model(x.bfloat16())) < 2e-2


@pytest.mark.parametrize(("form", "strict"), [("scaled-both", True), ("multiplicative-output-3", False)])
def test_a_language_model_to_a_file_and_back(form, strict):
    model = adapted("llama", form).get_base_model()
    batch = {**inputs("llama"), "use_cache": False}
    shapes = {"input_ids": {0: ROWS, 1: TOKENS}, "attention_mask": {0: ROWS, 1: TOKENS}, "use_cache": None}
    with torch.no_grad():
        program = export(model, (), batch, dynamic_shapes=shapes, strict=strict)
        file = io.BytesIO()
        save(program, file)
        file.seek(0)
        other = {**inputs("llama", rows=5, seed=4), "use_cache": False}
        assert distance(load(file).module()(**other).logits, model(**other).logits) < 1e-6


def test_a_merged_model():
    model = small("scaled-both")
    model.merge_adapter()
    x = torch.randn(2, 4, 6)
    assert distance(exported(model).module()(x), model(x)) < 1e-6
