"""torch.nn.MultiheadAttention, which reads the weights of its projections, alone and inside torch's transformer."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from formula import (
    HALF_TOLERANCE,
    activate,
    add,
    assert_close,
    assert_same_bits,
    assert_same_gradients,
    bits,
    configure,
    copies,
    formula,
    layers,
    set_scale,
    smaller_side,
)
from peft import (
    PeftModel,
    convert_to_lora,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from tiny_models import FORMS
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.checkpoint import checkpoint

# tall in-projection, square out-projection
WIDTH, HEADS = 6, 2
MASK = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


class Attention(nn.Module):
    """One attention layer named `layer`, which gets all that it is called with."""

    def __init__(self, dtype: torch.dtype = torch.float64, **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, dtype=dtype, **arguments)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def adapt(form: str, dtype: torch.dtype = torch.float64, seed: int = 1, **arguments: Any) -> PeftModel:
    net = Attention(dtype, **arguments)
    torch.manual_seed(seed)
    return get_peft_model(net, configure(form)).eval()


def inputs(*shape: int, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def expected(weight: Tensor, tensors: dict[str, Tensor], form: str, scale: float = 1.0) -> Tensor:
    side = smaller_side(form, *weight.shape)
    return formula(weight.detach(), tensors, FORMS[form]["mode"], side, scale)


def attend(attention: nn.MultiheadAttention, weights: tuple[Tensor, Tensor], qkv: list[Tensor], **options: Any) -> Any:
    """The attention of torch's functional API with two given weights, in float64."""
    q, k, v = (t.transpose(0, 1) if attention.batch_first and t.dim() == 3 else t for t in qkv)
    biases = (None if b is None else b.detach().double() for b in (attention.in_proj_bias, attention.out_proj.bias))
    in_bias, out_bias = biases
    extra = (None if b is None else b.detach().double() for b in (attention.bias_k, attention.bias_v))
    y, attended = F.multi_head_attention_forward(
        q, k, v, WIDTH, HEADS, weights[0], in_bias, *extra, attention.add_zero_attn, 0.0, weights[1], out_bias,
        training=False, **options,
    )  # fmt: skip
    return (y.transpose(0, 1) if attention.batch_first and y.dim() == 3 else y), attended


CALLS = {
    "plain": ({}, (5, 3), {}),
    "batch-first": ({"batch_first": True}, (3, 5), {}),
    "no-bias": ({"batch_first": True, "bias": False}, (3, 5), {"need_weights": False}),
    "unbatched": ({}, (5,), {"average_attn_weights": False}),
    "masks": ({"batch_first": True}, (3, 5), {"attn_mask": MASK, "key_padding_mask": PADDING}),
    "causal": ({"batch_first": True}, (3, 5), {"attn_mask": MASK, "is_causal": True, "need_weights": False}),
    "extras": ({"add_bias_kv": True, "add_zero_attn": True}, (5, 3), {"key_padding_mask": PADDING}),
}


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("call", CALLS)
def test_forward_gradients_and_merge_follow_the_formula(call, scale):
    arguments, shape, options = CALLS[call]
    for form in FORMS:
        model = adapt(form, **arguments)
        set_scale(model, scale)
        outer, inner = layers(model)
        attention = outer.get_base_layer()
        leaves = copies(outer), copies(inner)
        qkv, qkv_copies = inputs(*shape), inputs(*shape)
        for tensor in (*qkv, *qkv_copies):
            tensor.requires_grad_()
        weights = (
            expected(attention.in_proj_weight, leaves[0], form, scale),
            expected(inner.get_base_layer().weight, leaves[1], form, scale),
        )
        got, want = model(*qkv, **options), attend(attention, weights, qkv_copies, **options)
        assert_close(got[0], want[0], 1e-12, form)
        assert (got[1] is None) == (want[1] is None)
        if got[1] is not None:
            assert_close(got[1], want[1], 1e-12, form)
        g = torch.randn_like(got[0])
        got[0].backward(g)
        want[0].backward(g)
        for one, other in zip(qkv, qkv_copies, strict=True):
            assert_close(one.grad, other.grad, 1e-11, form)
        assert_same_gradients(outer, leaves[0], 1e-10)
        assert_same_gradients(inner, leaves[1], 1e-10)
        # without gradients torch takes a path of its own
        with torch.no_grad():
            assert_close(model(*qkv, **options)[0], want[0], 1e-12, form)
            before = bits(model)
            model.merge_adapter()
            assert_close(attention.in_proj_weight, weights[0], 1e-12, form)
            assert_close(attention.out_proj.get_base_layer().weight, weights[1], 1e-12, form)
            assert_close(model(*qkv, **options)[0], want[0], 1e-12, form)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
def test_precision(dtype):
    for form in FORMS:
        model = adapt(form, dtype, batch_first=True)
        outer, inner = layers(model)
        attention, leaves = outer.get_base_layer(), (copies(outer), copies(inner))
        qkv = inputs(3, 5, dtype=dtype)
        weights = (
            expected(attention.in_proj_weight, leaves[0], form),
            expected(inner.get_base_layer().weight, leaves[1], form),
        )
        y, _ = model(*qkv)
        want, _ = attend(attention, weights, [t.double() for t in qkv])
        assert y.dtype is dtype
        assert_close(y, want, HALF_TOLERANCE[dtype], form)
        y.backward(want.detach().to(dtype))
        want.backward(want.detach())
        for layer, tensors in zip((outer, inner), leaves, strict=True):
            assert_same_gradients(layer, tensors, 3 * HALF_TOLERANCE[dtype])
        model.merge_adapter()
        assert_close(model(*qkv)[0], want, HALF_TOLERANCE[dtype], form)


def test_autocast():
    qkv = inputs(3, 5, dtype=torch.float32)
    for form in FORMS:
        model = adapt(form, torch.float32, batch_first=True)
        want, _ = model(*qkv)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = model(*qkv)
        assert_close(y, want, 4e-2, form)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_keyword_arguments():
    q, k, v = inputs(5, 3)
    model = adapt("scaled-both")
    want, attended = model(q, k, v)
    got = model(query=q, key=k, value=v)
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], attended)


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_adapter_is_the_identity(form):
    net, qkv = Attention(), inputs(5, 3)
    want, _ = net(*qkv)
    assert torch.equal(get_peft_model(net, configure(form, init_weights=True))(*qkv)[0], want)


def test_only_the_out_projection():
    net, qkv = Attention(batch_first=True), inputs(3, 5)
    model = get_peft_model(net, configure("scaled-both", target_modules=["out_proj"])).eval()
    (layer,) = layers(model)
    weights = net.layer.in_proj_weight.detach(), expected(layer.get_base_layer().weight, copies(layer), "scaled-both")
    want, _ = attend(net.layer, weights, qkv)
    assert_close(model(*qkv)[0], want, 1e-12)
    with torch.no_grad():
        assert_close(model(*qkv)[0], want, 1e-12)
    plain = model.merge_and_unload()
    assert list(plain.state_dict()) == list(Attention().state_dict())
    assert_close(plain(*qkv)[0], want, 1e-12)


@pytest.mark.parametrize("targets", [["layer"], ["out_proj"], "all-linear"])
def test_mixed_batches_are_refused(targets):
    """One weight serves all rows, whether PEFT's hook reaches the layer or not."""
    model = get_peft_model(Attention(batch_first=True), configure("scaled", target_modules=targets)).eval()
    add(model, "second", "additive", target_modules=targets)
    with pytest.raises((TypeError, ValueError), match="does not support mixed adapter batches"):
        model(*inputs(3, 5), adapter_names=["default", "second", "__base__"])


def test_inputs_of_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"[Ss]ame embed for query/key/value.*target is 'layer'"):
        get_peft_model(Attention(kdim=3, vdim=4), configure("scaled"))


@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
def test_dropout_drops_features_of_the_input_of_the_update(form):
    """The same ones for all tokens, as the update is part of the weight; what is left is scaled up."""
    torch.manual_seed(1)
    model, qkv = get_peft_model(Attention(), configure(form, dlor_dropout=0.25)).eval(), inputs(5, 3)
    want, _ = model(*qkv)
    counts = []
    for layer in layers(model):
        model.eval()
        weight = getattr(layer.get_base_layer(), layer.parameter_name)
        update = expected(weight, copies(layer), form) - weight
        assert_close(layer.adapted_weight() - weight, update, 1e-10)
        layer.train()
        for _ in range(100):
            dropped = layer.adapted_weight() - weight
            kept = dropped.abs().sum(0) > 0
            assert_close(dropped, update * kept * (4 / 3), 1e-6)
            counts.append(kept.double().mean())
    assert 0.65 < torch.stack(counts).mean() < 0.85
    assert not torch.allclose(model.train()(*qkv)[0], want)
    assert torch.equal(model.eval()(*qkv)[0], want)


def test_projections_of_their_own_are_parameters():
    """Where query, key and value differ in width, each has a weight, which `target_parameters` takes."""
    net = Attention(kdim=3, vdim=4)
    names = ["layer.q_proj_weight", "layer.k_proj_weight", "layer.v_proj_weight"]
    q, k, v = torch.randn(5, 2, 6).double(), torch.randn(5, 2, 3).double(), torch.randn(5, 2, 4).double()
    base, _ = net(q, k, v)
    model = get_peft_model(net, configure("scaled-both", target_modules=[], target_parameters=names)).eval()
    assert [layer.parameter_name for layer in layers(model)] == ["v_proj_weight", "k_proj_weight", "q_proj_weight"]
    want, _ = model(q, k, v)
    assert not torch.allclose(want, base)
    for layer in layers(model):
        weight = getattr(layer.get_base_layer(), layer.parameter_name)
        assert_close(layer.adapted_weight(), expected(weight, copies(layer), "scaled-both"), 1e-12)
    model.merge_adapter()
    assert_close(model(q, k, v)[0], want, 1e-12)


def test_active_adapters_act_in_the_order_of_merging():
    chain = {"default": "scaled-both", "second": "multiplicative-input-3", "third": "additive"}
    model, qkv = adapt(chain["default"]), inputs(5, 3)
    add(model, "second", chain["second"])
    add(model, "third", chain["third"])
    outer, inner = layers(model)
    for order in (("default", "second", "third"), ("third", "second", "default"), ("second",)):
        activate(model, *order)
        attention, before = outer.get_base_layer(), bits(model)
        weights = [attention.in_proj_weight, inner.get_base_layer().weight]
        for name in order:
            pairs = zip(weights, (outer, inner), strict=True)
            weights = [expected(weight, copies(layer, name), chain[name]) for weight, layer in pairs]
        want, _ = attend(attention, tuple(weights), qkv)
        assert_close(model(*qkv)[0], want, 1e-12)
        model.merge_adapter()
        assert_close(model(*qkv)[0], want, 1e-12)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)


def test_gradient_checkpointing():
    grads = []
    for run in (lambda model, *qkv: model(*qkv), lambda *all_: checkpoint(*all_, use_reentrant=False)):
        model = adapt("multiplicative-output-3")
        run(model, *inputs(5, 3))[0].square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert len(grads[0]) == 6
    assert_same_bits(*grads)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_save_and_load(form, low_cpu_mem_usage, tmp_path):
    model, qkv = adapt(form, torch.float32), inputs(5, 3, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Attention(torch.float32), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(*qkv)[0], model(*qkv)[0])


def test_disable_delete_and_status():
    model, qkv = adapt("scaled-both"), inputs(5, 3)
    want, _ = Attention().eval()(*qkv)
    add(model, "second", "additive")
    outer, inner = get_layer_status(model)
    assert (outer.module_type, inner.module_type) == ("dlor.MultiheadAttention", "dlor.UncalledLinear")
    for status in (outer, inner):
        assert status.available_adapters == ["default", "second"]
        assert status.active_adapters == ["default"]
        assert status.requires_grad == {"default": True, "second": False}
    with model.disable_adapter():
        assert torch.equal(model(*qkv)[0], want)
    activate(model, "second")
    second, _ = model(*qkv)
    activate(model, "default")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert torch.equal(model(*qkv)[0], second)


@pytest.mark.parametrize("targets", [["layer"], ["out_proj"]])
def test_disabling_while_merged_unmerges_both_projections(targets):
    """The out-projection is never called: that its weight is read must do."""
    net, qkv = Attention().eval(), inputs(5, 3)
    want, _ = net(*qkv)
    model = get_peft_model(net, configure("scaled-both", target_modules=targets)).eval()
    adapted, _ = model(*qkv)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(*qkv)[0], want)
    assert torch.equal(model(*qkv)[0], adapted)


@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
def test_merge_and_unload(form):
    model, qkv = adapt(form), inputs(5, 3)
    want, _ = model(*qkv)
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert type(plain.layer) is nn.MultiheadAttention
    assert type(plain.layer.out_proj) is type(Attention().layer.out_proj)
    assert list(plain.state_dict()) == list(Attention().state_dict())
    assert_close(plain(*qkv)[0], want, 1e-12)
    unloaded = adapt(form).unload()
    assert_same_bits(unloaded.state_dict().values(), Attention().state_dict().values())


def test_an_out_projection_that_is_called():
    """Nothing keeps others from calling the class of layer that attention only reads."""
    net = nn.Sequential()
    net.add_module("layer", NonDynamicallyQuantizableLinear(7, 4, dtype=torch.float64))
    model, x = get_peft_model(net, configure("scaled-both")).eval(), torch.randn(3, 7, dtype=torch.float64)
    (layer,) = layers(model)
    base = layer.get_base_layer()
    want = F.linear(x, expected(base.weight, copies(layer), "scaled-both"), base.bias)
    assert_close(model(x), want, 1e-12)


def test_copies_and_pickles():
    model, qkv = adapt("scaled-both"), inputs(5, 3)
    want, _ = model(*qkv)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(*qkv)[0], want)
        twin.merge_adapter()
        assert_close(twin(*qkv)[0], want, 1e-12)
    assert torch.equal(model(*qkv)[0], want)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", ["additive", "multiplicative-output-3"])
def test_compiled_without_a_graph_break(form):
    torch._dynamo.reset()
    model, qkv = adapt(form, batch_first=True), inputs(3, 5)
    y, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(*qkv)
    assert_close(y, model(*qkv)[0], 1e-12)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_injection_by_a_state_dict():
    model, qkv = adapt("scaled-both", torch.float32), inputs(5, 3, dtype=torch.float32)
    state = get_peft_model_state_dict(model)
    plain = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    injected = inject_adapter_in_model(configure("scaled-both"), Attention(torch.float32), state_dict=plain)
    assert not set_peft_model_state_dict(injected, state).unexpected_keys
    assert torch.equal(injected(*qkv)[0], model(*qkv)[0])


def test_conversion_to_lora_is_refused():
    """PEFT converts linear layers only, and would take W' - W for that of one."""
    with pytest.raises((TypeError, ValueError)):
        convert_to_lora(adapt("scaled", torch.float32), 2)
