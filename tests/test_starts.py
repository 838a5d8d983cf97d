"""Starts of V from the weights and from data: the directions are the right ones, and the adapter is the identity."""

from collections import OrderedDict

import pytest
import torch
from accelerate import cpu_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from tiny_models import FORMS, TARGETS, adapted, build, config_of, inputs, layers, logits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlor_peft import DLoRConfig, DLoRLayer, initialize_from_data
from dlor_peft.layers import start
from dlor_peft.layers.start import top_right_singular_vectors

LOW_RANK = [form for form, fields in FORMS.items() if fields.get("r") != 0]


def one(base: nn.Module, **config) -> tuple[PeftModel, DLoRLayer]:
    torch.manual_seed(1)
    net = nn.Sequential(OrderedDict(layer=base))
    model = get_peft_model(net, DLoRConfig(**{"r": 2, "target_modules": ["layer"], **config}))
    return model, next(module for module in model.modules() if isinstance(module, DLoRLayer))


def directions(layer: DLoRLayer, part: str = "dlor_V") -> Tensor:
    """(..., q, L r) with the columns of F_1 first."""
    weight = getattr(layer, part)["default"].weight.detach().double()
    return weight.movedim(0, -2).flatten(-2)


def assert_are(got: Tensor, X: Tensor, size: float = 3**-0.5, tolerance: float = 1e-4) -> None:
    """The columns are the leading right-singular vectors of X, times size, each up to its sign."""
    _, _, transposed = torch.linalg.svd(X.detach().double(), full_matrices=False)
    want = size * transposed.mT[:, : got.shape[1]]
    torch.testing.assert_close(got * (got * want).sum(0).sign(), want, rtol=0, atol=tolerance)
    # the sign is that of the largest entry
    assert (got.gather(0, got.abs().argmax(0, keepdim=True)) > 0).all()


def spread(*shape: int, seed: int = 0) -> Tensor:
    """A random tensor whose singular values, as a matrix of its first and all other dimensions, lie well apart."""
    matrix = torch.randn(shape[0], int(torch.tensor(shape[1:]).prod()), generator=torch.Generator().manual_seed(seed))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return ((U * 0.7 ** torch.arange(len(S))) @ Vh).reshape(shape)


def with_weight(base: nn.Module, weight: Tensor) -> nn.Module:
    base.weight.data = weight
    return base


# ---- the weight


@pytest.mark.parametrize("form", LOW_RANK)
@pytest.mark.parametrize("kind", TARGETS)
def test_a_start_from_the_weights_is_the_identity_bit_for_bit(kind, form):
    want = logits(build(kind), kind)
    model = get_peft_model(build(kind), config_of(kind, form, init_weights="svd"))
    assert torch.equal(logits(model, kind), want)
    assert any(directions(layer).any() for layer in layers(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "config",
    [
        {"mode": "additive"},
        {"mode": "scaled", "side": "input"},
        {"mode": "scaled", "side": "both"},
        {"mode": "multiplicative", "side": "input", "depth": 2},
        {"mode": "multiplicative", "side": "output", "depth": 2},
    ],
    ids=str,
)
def test_v_is_the_top_of_the_weight(config, dtype):
    W = spread(12, 9).to(dtype)
    for base in (with_weight(nn.Linear(9, 12), W), with_weight(Conv1D(12, 9), W.mT.contiguous())):
        _, layer = one(base.to(dtype), init_weights="svd", **config)
        assert_are(
            directions(layer),
            W.mT if "output" in config.values() else W,
            tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4,
        )


def test_the_taps_of_a_convolution():
    W = spread(8, 6, 3, 2)
    for config, seen in (
        ({"mode": "scaled"}, W.flatten(1)),
        ({"mode": "multiplicative", "side": "input"}, W.movedim(1, -1).flatten(0, -2)),
        ({"mode": "multiplicative", "side": "output"}, W.flatten(1).mT),
    ):
        _, layer = one(with_weight(nn.Conv2d(6, 8, (3, 2)), W), init_weights="svd", **config)
        assert_are(directions(layer), seen)


@pytest.mark.parametrize("mode", ["scaled", "multiplicative"])
def test_experts_each_have_their_own(mode):
    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.stack([spread(7, 5, seed=e) for e in range(3)]))

    targets = {"target_modules": [], "target_parameters": ["layer.weight"]}
    _, layer = one(Bank(), init_weights="svd", mode=mode, side="input", depth=1, **targets)
    for e, W in enumerate(layer.get_base_layer().weight):
        assert_are(directions(layer)[e], W)


def test_of_an_embedding_u_is_what_has_directions():
    W = spread(20, 6)
    _, layer = one(with_weight(nn.Embedding(20, 6), W), init_weights="svd")
    assert not directions(layer).any()
    assert_are(directions(layer, "dlor_U"), W, size=6**0.5)
    _, layer = one(with_weight(nn.Embedding(20, 6), W), init_weights="svd", mode="multiplicative", side="output")
    assert_are(directions(layer), W)


def test_tied_layers_share_the_start():
    base = build("llama", tie_word_embeddings=True)
    config = config_of(
        "llama", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True, init_weights="svd"
    )
    found = layers(get_peft_model(base, config))
    (head,), (embedding,) = ([found[name] for name in found if part in name] for part in ("lm_head", "embed_tokens"))
    assert head.dlor_U["default"] is embedding.dlor_U["default"]
    assert_are(directions(embedding, "dlor_U"), embedding.get_base_layer().weight, size=4.0)


def test_what_the_weight_does_not_have_stays_random():
    rank_one = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 6.0))
    _, plain = one(with_weight(nn.Linear(5, 6), rank_one), r=3)
    _, layer = one(with_weight(nn.Linear(5, 6), rank_one), r=3, init_weights="svd")
    assert_are(directions(layer)[:, :1], rank_one)
    assert torch.equal(directions(layer)[:, 1:], directions(plain)[:, 1:])
    _, plain = one(nn.Linear(2, 6), r=5)
    _, layer = one(nn.Linear(2, 6), r=5, init_weights="svd")
    assert torch.equal(directions(layer)[:, 2:], directions(plain)[:, 2:])
    _, layer = one(with_weight(nn.Linear(5, 6), torch.zeros(6, 5)), r=3, init_weights="svd")
    assert directions(layer).any()


def test_the_size_is_that_of_a_random_start():
    torch.manual_seed(0)
    base = nn.Linear(300, 200)
    for config in ({}, {"mode": "multiplicative", "depth": 3, "side": "output"}):
        plain, svd = (directions(one(base, r=8, init_weights=kind, **config)[1]).norm() for kind in (True, "svd"))
        assert svd.item() == pytest.approx(plain.item(), rel=0.05)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.integers(0, 10**6))
def test_the_vectors_hold_as_much_of_the_matrix_as_the_best(rows, columns, count, seed):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.9 ** torch.arange(columns)
    V = top_right_singular_vectors(W, count)
    best = torch.linalg.svdvals(W.double())[:count].square().sum()
    assert (W.double() @ V.double()).square().sum() >= best * (1 - 1e-4)
    torch.testing.assert_close(V.mT @ V, torch.eye(V.shape[1]), rtol=0, atol=1e-5)
    assert V.shape[1] <= count


def test_a_large_matrix_is_iterated_and_the_random_state_is_left_alone():
    W, state = spread(150, 200), torch.get_rng_state()
    V = top_right_singular_vectors(W, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert_are(V.double(), W, size=1.0, tolerance=1e-5)
    torch.manual_seed(7)
    assert torch.equal(V, top_right_singular_vectors(W, 4))


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"a weight that is not finite.*exclude_modules"):
        one(with_weight(nn.Linear(3, 3), torch.full((3, 3), float("nan"))), init_weights="svd")


def test_an_offloaded_weight_is_read_where_it_is():
    plain = layers(get_peft_model(build("llama"), config_of("llama", init_weights="svd")))
    moved = layers(get_peft_model(cpu_offload(build("llama"), "cpu"), config_of("llama", init_weights="svd")))
    assert next(iter(moved.values())).get_base_layer().weight.is_meta
    for name, layer in moved.items():
        assert torch.equal(directions(layer), directions(plain[name]))


@pytest.fixture
def counted(monkeypatch):
    """How many decompositions there have been."""
    calls = []
    compute = start.top_right_singular_vectors
    monkeypatch.setattr(start, "top_right_singular_vectors", lambda *args: calls.append(1) or compute(*args))
    return calls


# PEFT asks the hub for a tokenizer that a local adapter folder does not have
@pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")
def test_loading_computes_nothing(tmp_path, counted):
    model = get_peft_model(build("llama"), config_of("llama", init_weights="svd"))
    assert len(counted) == len(layers(model))
    counted.clear()
    state = get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).init_weights == "svd"

    def same(loaded, name="default"):
        got = get_peft_model_state_dict(loaded, adapter_name=name)
        assert got.keys() == state.keys()
        assert all(torch.equal(got[key], state[key]) for key in state)

    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True, "is_trainable": True}):
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path, **options)
        same(loaded)
        loaded.load_adapter(tmp_path, "second", is_trainable=True)
        same(loaded, "second")
    PeftMixedModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    base = build("llama")
    base.load_adapter(str(tmp_path), is_trainable=True)
    own = config_of("llama", init_weights="svd")
    inject_adapter_in_model(
        own, build("llama"), state_dict={k.removeprefix("base_model.model."): v for k, v in state.items()}
    )
    with torch.device("meta"):
        get_peft_model(build("llama"), own)
    assert not counted
    # a fresh adapter from the saved configuration is one again
    config = PeftConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    get_peft_model(build("llama"), config)
    assert counted


# ---- the data


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
