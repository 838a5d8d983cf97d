"""Starts of V from data: the directions are the right ones, and the adapter is the identity."""

import pytest
import torch
from peft import (
    get_peft_model,
)
from starts import LOW_RANK, assert_are, directions, one, spread
from tiny_models import TARGETS, adapted, build, config_of, inputs, layers, logits
from torch import Tensor, nn

from dlor_peft import DLoRConfig, initialize_from_data


def batch(rows: int, seed: int = 0) -> Tensor:
    """Rows whose directions are well apart."""
    return spread(rows, 9, seed=seed)


@pytest.mark.parametrize("form", LOW_RANK)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_start_from_data_is_the_identity_bit_for_bit(kind, form):
    want = logits(build(kind), kind)
    model = get_peft_model(build(kind), config_of(kind, form, init_weights=True))
    before = {name: directions(layer) for name, layer in layers(model).items()}
    initialize_from_data(model, [inputs(kind), inputs(kind, seed=2)], progress=False)
    assert torch.equal(logits(model, kind), want)
    for name, layer in layers(model).items():
        assert not torch.equal(directions(layer), before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "config", [{}, {"mode": "additive"}, {"mode": "multiplicative", "side": "input", "depth": 2}], ids=str
)
def test_v_is_the_top_of_the_inputs(config, dtype):
    model, layer = one(nn.Linear(9, 12).to(dtype), **config)
    batches = [batch(30, seed).to(dtype) for seed in range(3)]
    initialize_from_data(model, batches, progress=False)
    assert_are(directions(layer), torch.cat(batches), tolerance=1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_on_the_output_side_it_is_the_output_without_the_bias():
    base = nn.Linear(9, 12)
    with torch.no_grad():
        base.bias.fill_(100.0)
    model, layer = one(base, mode="multiplicative", side="output")
    initialize_from_data(model, [batch(30)], progress=False)
    assert_are(directions(layer), batch(30) @ base.weight.mT, tolerance=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_patches_of_a_convolution(groups):
    base = nn.Conv1d(6, 4, 3, stride=2, padding=1, groups=groups)
    x = torch.randn(5, 6, 11) * 0.6 ** torch.arange(6).unsqueeze(-1)
    model, layer = one(base)
    initialize_from_data(model, [x], progress=False)
    patches = nn.functional.pad(x, (1, 1)).unfold(-1, 3, 2)  # (B, C, T, K)
    grouped = patches.unflatten(1, (groups, -1)).permute(0, 1, 3, 2, 4).flatten(3).flatten(0, 2)
    assert_are(directions(layer), grouped, tolerance=1e-3)
    model, layer = one(base, mode="multiplicative", side="input")
    initialize_from_data(model, [x], progress=False)
    assert_are(directions(layer), x.unflatten(1, (groups, -1)).movedim(2, -1).flatten(0, -2), tolerance=1e-3)


def test_a_wide_layer_is_sketched():
    """m = 4 r + 32 columns for d = 400."""
    torch.manual_seed(0)
    model, layer = one(nn.Linear(400, 5), r=2)
    batches = [spread(50, 400, seed=seed) for seed in range(2)]
    initialize_from_data(model, batches, progress=False)
    assert_are(directions(layer), torch.cat(batches), tolerance=2e-2)


def test_what_the_data_do_not_have_stays_random():
    model, layer = one(nn.Linear(9, 12), r=4)
    before = directions(layer)
    x = batch(2)
    initialize_from_data(model, [x], progress=False)
    assert_are(directions(layer)[:, :2], x, tolerance=1e-3)
    assert torch.equal(directions(layer)[:, 2:], before[:, 2:])


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_padding_does_not_count(kind):
    def started(pad: int) -> dict[str, Tensor]:
        padded = dict(inputs(kind))
        ids = padded["input_ids"]
        padded["input_ids"] = torch.cat([ids, torch.full((len(ids), pad), 5)], dim=1)
        padded["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), pad).long()], dim=1)
        if kind == "t5":
            padded["decoder_attention_mask"] = torch.ones_like(padded["decoder_input_ids"])
        model = get_peft_model(build(kind), config_of(kind, init_weights=True, r=1))
        initialize_from_data(model, [padded], progress=False)
        return {name: directions(layer) for name, layer in layers(model).items()}

    plain, padded = started(0), started(4)
    for name, V in plain.items():
        # keys and values of the encoder's output, inside of the decoder, are seen with its padding
        if "EncDecAttention" not in name or ".v" not in name:
            torch.testing.assert_close(padded[name], V, rtol=0, atol=2e-3, msg=name)


def test_the_model_is_left_as_it_was_found():
    model = adapted("llama", init_weights=True).train()
    model.base_model.model.model.layers[0].eval()
    modes = {module: module.training for module in model.modules()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    parameters = dict(model.named_parameters())

    class Broken(Exception):
        pass

    def broken():
        yield inputs("llama")
        raise Broken

    before = {name: value.detach().clone() for name, value in parameters.items()}
    with pytest.raises(Broken):
        initialize_from_data(model, broken(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    initialize_from_data(model, [inputs("llama")], progress=False)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.grad is None
        assert torch.equal(parameter, before[name]) == ("dlor_V" not in name), name
    assert {module: module.training for module in model.modules()} == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_batches_of_every_kind_and_as_many_as_asked_for(capsys):
    model, layer = one(nn.Linear(9, 12))
    initialize_from_data(model, iter([batch(30), [batch(30, 1)], (batch(30, 2),)]), num_batches=1)
    assert "Looking at inputs: 100%" in capsys.readouterr().err
    assert_are(directions(layer), batch(30), tolerance=1e-3)
    initialize_from_data(model, [batch(30), [batch(30, 1)], {"input": batch(30, 2)}], progress=False)
    assert not capsys.readouterr().err
    with pytest.raises(TypeError, match="a batch is a str"):
        initialize_from_data(model, ["text"], progress=False)


def test_other_adapters_are_not_touched():
    model = adapted("llama")
    before = logits(model, "llama")
    model.add_adapter("second", config_of("llama", "multiplicative", init_weights=True))
    initialize_from_data(model, [inputs("llama")], "second", progress=False)
    assert torch.equal(logits(model, "llama"), before)


def unreached() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(9, 4), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    return get_peft_model(Net(), DLoRConfig(target_modules=["first", "second"]))


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (unreached, {}, r"the layer 'base_model.model.second' saw no input"),
        (unreached, {"adapter_name": "other"}, r"no DLoR adapter 'other'. It has 'default'"),
        (unreached, {"num_batches": 0}, r"num_batches must be at least 1, but it is 0"),
        (
            lambda: one(nn.Linear(9, 4), init_weights=False)[0],
            {},
            r"'default' is not the identity in .*layer.*trained",
        ),
        (lambda: one(nn.Linear(9, 4), r=0)[0], {}, r"has no V to start: r is 0"),
        (
            lambda: one(nn.Linear(9, 4), target_modules=[], target_parameters=["layer.weight"])[0],
            {},
            r'ParamWrapper\) adapts a weight that others read.*init_weights="svd"',
        ),
        (lambda: nn.Linear(9, 4), {}, r"no DLoR adapter 'default'. It has none"),
    ],
    ids=["unreached", "unknown", "no-batches", "random", "r0", "parameter", "none"],
)
def test_what_is_refused(make, arguments, match):
    with pytest.raises(ValueError, match=match) as caught:
        initialize_from_data(make(), [batch(5)], progress=False, **arguments)
    assert str(caught.value).startswith("dlor_peft.initialisation: ")


def test_no_batch_and_infinite_inputs_are_refused():
    model, _ = one(nn.Linear(9, 4))
    with pytest.raises(ValueError, match="saw no input"):
        initialize_from_data(model, [], progress=False)
    with pytest.raises(ValueError, match="is not finite"):
        initialize_from_data(model, [torch.full((3, 9), float("inf"))], progress=False)


def test_a_trained_diagonal_is_noticed():
    model, layer = one(nn.Linear(9, 4))
    with torch.no_grad():
        layer.dlor_diag["default"].weight[0, 0] = 0.1
    with pytest.raises(ValueError, match="is not the identity"):
        initialize_from_data(model, [batch(5)], progress=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_batches_of_a_transformer_encoder_are_nested():
    torch.manual_seed(0)
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = get_peft_model(net, DLoRConfig(r=2, target_modules=["linear1"]))
    (layer,) = layers(model).values()
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5).bool()
    padding[:, 3:] = True
    initialize_from_data(model, [{"src": x, "src_key_padding_mask": padding}], progress=False)
    torch.testing.assert_close((directions(layer).mT @ directions(layer)), torch.eye(2).double() / 3)
