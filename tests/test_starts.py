"""Starts of V from the weights: the directions are the right ones, and the adapter is the identity."""

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
from starts import LOW_RANK, assert_are, directions, one, spread, with_weight
from tiny_models import TARGETS, build, config_of, layers, logits
from torch import nn
from transformers.pytorch_utils import Conv1D

from dlor_peft.layers import start
from dlor_peft.layers.start import top_right_singular_vectors


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
