"""Embeddings: every form against the formula, whole-token dropout, padding, scaled embeddings."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from formula import (
    HALF_TOLERANCE,
    activate,
    adapt,
    add,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    bits,
    copies,
    formula,
    layers,
    set_scale,
    stored,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, convert_to_lora, get_layer_status, get_peft_model, set_peft_model_state_dict
from tiny_models import FORMS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

# tokens have no input side; "auto" is the output side
EMBEDDED = [form for form, fields in FORMS.items() if fields.get("side", "auto") in ("auto", "output")]
SHAPES = [(11, 5), (5, 11), (6, 6)]


def embedding_of(tokens: int, width: int, dtype: torch.dtype = torch.float64, **arguments) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(tokens, width, dtype=dtype, **arguments)


def ids_of(tokens: int, *shape: int) -> Tensor:
    """Every token once, if there is room, and then some again."""
    ids = torch.arange(torch.Size(shape).numel()) % tokens
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(5))].view(shape)


def expected_table(table: Tensor, tensors: dict[str, Tensor], form: str, scale: float = 1.0) -> Tensor:
    """W' as it is stored, one row a token."""
    return formula(table.detach().T, tensors, FORMS[form]["mode"], "output", scale).T


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("form", EMBEDDED)
def test_forward_gradients_and_merge_follow_the_formula(form, scale):
    for tokens, width in SHAPES:
        base, ids = embedding_of(tokens, width), ids_of(tokens, 3, 5)
        model = adapt(base, form)
        set_scale(model, scale)
        (layer,) = layers(model)
        tensors = copies(layer)
        y, want = model(ids), F.embedding(ids, expected_table(base.weight, tensors, form, scale))
        assert_close(y, want, 1e-12)
        g = torch.randn_like(y)
        y.backward(g)
        want.backward(g)
        assert_same_gradients(layer, tensors, 1e-11)
        before, table = bits(model), expected_table(base.weight, tensors, form, scale)
        model.merge_adapter()
        assert base.weight.is_contiguous()
        assert_close(base.weight, table, 1e-12)
        assert_close(model(ids), want, 1e-12)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from(EMBEDDED), st.sampled_from([(), (1,), (4,), (2, 3), (0, 2)]),
    st.sampled_from([torch.int64, torch.int32]), st.booleans(),
)  # fmt: skip
def test_merge_equals_forward_for_any_shape(tokens, width, form, shape, dtype, padded):
    base = embedding_of(tokens, width, padding_idx=-1 if padded else None)
    model, ids = adapt(base, form), ids_of(tokens, *shape).to(dtype)
    before = bits(model)
    with torch.no_grad():
        y = model(ids)
        assert y.shape == (*shape, width)
        model.merge_adapter()
        assert_close(y, model(ids), 1e-12)
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
def test_precision(dtype):
    for form in EMBEDDED:
        base, ids = embedding_of(11, 5, dtype), ids_of(11, 3, 5)
        model = adapt(base, form)
        (layer,) = layers(model)
        tensors = copies(layer)
        assert all(tensor.dtype is torch.float32 for tensor in stored(layer).values())
        y, want = model(ids), F.embedding(ids, expected_table(base.weight, tensors, form))
        assert y.dtype is dtype
        assert_close(y, want, HALF_TOLERANCE[dtype], form)
        g = want.detach().to(dtype)
        y.backward(g)
        want.backward(g.double())
        assert_same_gradients(layer, tensors, HALF_TOLERANCE[dtype])
        model.merge_adapter()
        assert base.weight.dtype is dtype
        assert_close(model(ids), want, HALF_TOLERANCE[dtype], form)


@pytest.mark.parametrize("form", EMBEDDED)
def test_autocast(form):
    base, ids = embedding_of(11, 5, torch.float32), ids_of(11, 3, 5)
    model = adapt(base, form)
    (layer,) = layers(model)
    tensors = copies(layer)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(ids)
    want = F.embedding(ids, expected_table(base.weight, tensors, form))
    assert_close(y, want, 4e-2)
    y.backward(want.detach().to(y.dtype))
    want.backward(want.detach())
    assert_same_gradients(layer, tensors, 4e-2)


@pytest.mark.parametrize("form", EMBEDDED)
def test_a_fresh_adapter_is_the_identity_and_trains_the_tokens_that_occur(form):
    base, ids = embedding_of(11, 5), torch.tensor([[2, 7, 2]])
    model = adapt(base, form, init_weights=True)
    y = model(ids)
    assert torch.equal(y, base(ids))
    y.backward(torch.randn_like(y))
    grads = {part: parameter.grad for part, parameter in stored(layers(model)[0]).items()}
    # the rows of V are tokens where the factors do not multiply the embedding
    if "dlor_V" in grads and FORMS[form]["mode"] != "multiplicative":
        occur = grads["dlor_V"].abs().sum((0, 2)) > 0
        assert occur.nonzero().flatten().tolist() == [2, 7]
    assert any(grad.abs().sum() > 0 for grad in grads.values())


# a scalar of mode "additive" belongs to the padding token as to all others
@pytest.mark.parametrize("form", [form for form in EMBEDDED if form != "additive-scalar"])
def test_the_padding_token_is_not_trained(form):
    """As nn.Embedding itself has it: the row of padding_idx gets no gradient, and so stays what it is."""
    base = embedding_of(7, 9, padding_idx=2)
    model = adapt(base, form, init_weights=True)
    (layer,) = layers(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], 0.5)
    ids = torch.tensor([[2, 2, 4], [2, 1, 2]])
    for _ in range(3):
        optimizer.zero_grad()
        (model(ids) - 1).square().sum().backward()
        optimizer.step()
    assert_close(model(torch.tensor([4])), expected_table(base.weight, copies(layer), form)[[4]], 1e-11)
    assert not torch.allclose(model(torch.tensor([4])), base(torch.tensor([4])))
    assert torch.equal(model(torch.tensor([2])), torch.zeros(1, 9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"side": "input"}, r"input features of an embedding are its tokens.*'output' or 'auto'.*target is 'layer'"),
        ({"side": "both"}, "input features of an embedding are its tokens"),
        ({"mode": "multiplicative", "side": "input"}, "input features of an embedding are its tokens"),
    ],
    ids=str,
)
def test_sides_that_would_mix_tokens_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        adapt(nn.Embedding(7, 5), changes)


def test_max_norm_is_refused():
    with pytest.raises(ValueError, match=r"max_norm rescales its rows.*The target is 'layer'"):
        adapt(nn.Embedding(7, 5, max_norm=1.0))


@pytest.mark.parametrize("form", ["additive", "additive-r0", "additive-none", "scaled-none"])
def test_dropout_drops_the_update_of_whole_tokens(form):
    base, ids = embedding_of(5, 4), torch.arange(5).repeat(60, 1)
    model = adapt(base, form, dlor_dropout=0.25)
    update = (model(ids) - base(ids)).detach()
    dropped = (model.train()(ids) - base(ids)).detach()
    touched = update.abs().sum(-1) > 1e-9
    ratio = (dropped / update)[touched]
    ratio = torch.where(update[touched].abs() > 1e-9, ratio, torch.nan)
    for one in ratio:
        one = one[~one.isnan()]
        assert torch.allclose(one, one[:1].expand_as(one), atol=1e-6)
        assert min(abs(one[0]), abs(one[0] - 4 / 3)) < 1e-6
    kept = (ratio.nan_to_num(0).abs().amax(-1) > 0.5).double().mean()
    assert 0.6 < kept < 0.9


def test_dropout_in_the_other_modes_is_gone_in_eval():
    for form in EMBEDDED:
        base, ids = embedding_of(11, 5), ids_of(11, 3, 5)
        model = adapt(base, form, dlor_dropout=0.5)
        want = F.embedding(ids, expected_table(base.weight, copies(layers(model)[0]), form))
        assert_close(model(ids), want, 1e-12, form)
        torch.manual_seed(1)
        assert not torch.allclose(model.train()(ids), want), form


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "build",
    [
        lambda: Gemma3TextScaledWordEmbedding(9, 6, padding_idx=0, embed_scale=6**0.5),
        lambda: BartScaledWordEmbedding(9, 6, padding_idx=1, embed_scale=2.5),
    ],
    ids=["gemma3", "bart"],
)
def test_scaled_embeddings_scale_the_update_too(build, dtype):
    for form in EMBEDDED:
        torch.manual_seed(0)
        base, ids = build().to(dtype), ids_of(9, 2, 6).clamp_min(2)
        model = adapt(base, form)
        (layer,) = layers(model)
        tensors = copies(layer)
        factor = float(torch.as_tensor(base.embed_scale).to(dtype))
        table = expected_table(base.weight, tensors, form)
        y, want = model(ids), F.embedding(ids, table) * factor
        assert y.dtype is dtype
        assert_close(y, want, HALF_TOLERANCE[dtype], form)
        y.backward(want.detach().to(dtype))
        want.backward(want.detach().to(dtype).double())
        assert_same_gradients(layer, tensors, HALF_TOLERANCE[dtype])
        model.merge_adapter()
        assert_close(base.weight, table, HALF_TOLERANCE[dtype], form)
        assert_close(model(ids), want, HALF_TOLERANCE[dtype], form)


@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative-output-3"])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_offloaded_embedding_gives_the_same(form, scaled):
    base = BartScaledWordEmbedding(9, 6, 1, embed_scale=2.5) if scaled else nn.Embedding(9, 6)
    model, ids = adapt(base, form), ids_of(9, 2, 6)
    with torch.no_grad():
        want = model(ids)
        cpu_offload(model, execution_device="cpu")
        assert base.weight.is_meta
        got = model(ids)
        assert not got.is_meta
        assert_close(got, want, 1e-6)


def test_active_adapters_act_in_the_order_of_merging():
    chain = {"default": "scaled-output", "second": "multiplicative-output-3", "third": "additive"}
    base, ids = embedding_of(11, 5), ids_of(11, 3, 5)
    model = adapt(base, chain["default"])
    add(model, "second", chain["second"])
    add(model, "third", chain["third"])
    for order in (("default", "second", "third"), ("third", "second", "default"), ("second", "third")):
        activate(model, *order)
        table, before = base.weight, bits(model)
        for name in order:
            table = expected_table(table, copies(layers(model)[0], name), chain[name])
        want = F.embedding(ids, table)
        assert_close(model(ids), want, 1e-12)
        model.merge_adapter()
        assert_close(base.weight, table, 1e-12)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)


@pytest.mark.parametrize("shape", [(4, 3), (4,)])
def test_mixed_batch(shape):
    model, ids = adapt(embedding_of(11, 5), "additive"), ids_of(11, *shape)
    add(model, "second", "multiplicative-output-3")
    names, alone = ["second", "__base__", "default", "second"], {}
    for name in ("default", "second"):
        activate(model, name)
        alone[name] = model(ids)
    with model.disable_adapter():
        alone["__base__"] = model(ids)
    want = torch.stack([alone[name][row] for row, name in enumerate(names)])
    assert_close(model(ids, adapter_names=names), want, 1e-12)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(ids, adapter_names=names[1:])


def test_gradient_checkpointing():
    for form in EMBEDDED:
        grads = []
        for checkpointed in (False, True):
            model, ids = adapt(embedding_of(11, 5), form, dlor_dropout=0.3).train(), ids_of(11, 3, 5)
            torch.manual_seed(0)
            y = checkpoint(model, ids, use_reentrant=False) if checkpointed else model(ids)
            y.square().sum().backward()
            grads.append([parameter.grad for parameter in stored(layers(model)[0]).values()])
        assert_same_bits(*grads)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", EMBEDDED)
def test_save_and_load(form, low_cpu_mem_usage, tmp_path):
    model, ids = adapt(embedding_of(11, 5, torch.float32), form), ids_of(11, 3, 5)
    model.save_pretrained(tmp_path)
    fresh = nn.Sequential()
    fresh.add_module("layer", embedding_of(11, 5, torch.float32))
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(ids), model(ids))


def test_disable_delete_and_status():
    base, ids = embedding_of(11, 5), ids_of(11, 3, 5)
    model = adapt(base, "additive")
    add(model, "second", "scaled-output")
    (status,) = get_layer_status(model)
    assert status.module_type == "dlor.Embedding"
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids), base(ids))
    tensors = copies(layers(model)[0], "second")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert_close(model(ids), F.embedding(ids, expected_table(base.weight, tensors, "scaled-output")), 1e-12)


@pytest.mark.parametrize("form", EMBEDDED)
def test_merge_and_unload(form):
    model, ids = adapt(embedding_of(11, 5, padding_idx=3), form), ids_of(11, 3, 5)
    want = model(ids)
    plain = model.merge_and_unload()
    assert type(plain.layer) is nn.Embedding
    assert plain.layer.padding_idx == 3
    assert list(plain.state_dict()) == ["layer.weight"]
    assert_close(plain(ids), want, 1e-12)
    assert_same_bits(adapt(embedding_of(11, 5), form).unload().parameters(), embedding_of(11, 5).parameters())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative-output-3"])
def test_compiled_without_a_graph_break(form):
    torch._dynamo.reset()
    model, ids = adapt(embedding_of(11, 5), form), ids_of(11, 3, 5)
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    assert_close(y, model(ids), 1e-12)
    y.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in stored(layers(model)[0]).values())


@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative"])
def test_weighted_sums(form):
    model = adapt(embedding_of(11, 5), form)
    add(model, "second", form)
    (layer,) = layers(model)
    want = 0.5 * layer.get_delta_weight("default") - 2 * layer.get_delta_weight("second")
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", "cat")
    assert_close(layer.get_delta_weight("sum"), want, 1e-6)
    activate(model, "sum")
    assert_close(model(torch.arange(11)), (layer.get_base_weight() + want).float().double(), 1e-6)


def test_conversion_to_lora_is_exact_or_refused():
    """PEFT converts linear layers only: the keys of an embedding's LoRA have other names."""
    base, ids = embedding_of(11, 5, torch.float32), ids_of(11, 3, 5)
    model = adapt(base, "scaled")
    want = model(ids)
    try:
        config, state = convert_to_lora(model, 5)
    except (TypeError, ValueError):
        return
    lora = get_peft_model(model.unload(), config)
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    assert_close(lora(ids), want, 1e-4)
