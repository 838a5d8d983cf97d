"""PeftMixedModel nests the layers of its methods: what is merged is what answers, in every order, or is refused."""

import itertools

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftMixedModel,
    ShiraConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import build, config_of, distance, layers, logits
from torch import nn

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "dlor": lambda: config_of("llama", "scaled-both", target_modules=TARGETS),
    "output": lambda: config_of("llama", "multiplicative-output-3", target_modules=TARGETS),
    "lora": lambda: LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
    "biased": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_bias=True),
    "adalora": lambda: AdaLoraConfig(init_r=2, total_step=9, target_modules=TARGETS, init_lora_weights=False),
    "loha": lambda: LoHaConfig(r=2, target_modules=TARGETS, init_weights=False),
    "lokr": lambda: LoKrConfig(r=2, target_modules=TARGETS, init_weights=False),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=TARGETS, init_weights=False),
    "dora": lambda: LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, use_dora=True),
    "shira": lambda: ShiraConfig(r=1, target_modules=TARGETS, init_weights=False),
}
NESTED = [
    *itertools.permutations(["dlor", "lora", "loha"]),
    *itertools.permutations(["output", "oft", "lokr"]),
    ("dlor", "lora", "output"),
    ("lora", "dlor", "lora"),
    ("dlor", "lora", "dlor", "oft", "output"),
    ("lora", "loha", "dlor"),
    ("biased", "output"),
    ("output", "biased"),
    ("biased", "dlor", "adalora"),
    ("dora", "dlor"),
    ("shira", "output", "lora"),
]
# another order makes a difference of 1e-2
TOLERANCE = 1e-4
pytestmark = [
    # PEFT asks every layer to unmerge, the merged ones and the others
    pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning"),
    # SHiRA's tensors
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]
nested = pytest.mark.parametrize("methods", NESTED, ids="-".join)


def mixed(*methods):
    """Adapters "a0", "a1" and so on, all active, from the inside to the outside."""
    torch.manual_seed(2)
    model = get_peft_model(build("llama"), CONFIGS[methods[0]](), adapter_name="a0", mixed=True)
    for i, method in enumerate(methods[1:], 1):
        model.add_adapter(f"a{i}", CONFIGS[method]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.set_adapter([f"a{i}" for i in range(len(methods))])
    return model.eval()


def base_state(model):
    return {name: value.clone() for name, value in model.state_dict().items() if not is_adapter(name)}


def is_adapter(name):
    return any(f".a{i}" in name for i in range(5))


def assert_same_base(model, state, exactly=True):
    for name, value in model.state_dict().items():
        if not is_adapter(name):
            assert torch.equal(value, state[name]) if exactly else distance(value, state[name]) < TOLERANCE, name


@nested
def test_merged_as_it_answers(methods):
    model = mixed(*methods)
    state, want = base_state(model), logits(model, "llama")
    assert distance(want, logits(build("llama"), "llama")) > 1e-3
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert distance(logits(model, "llama"), want) < TOLERANCE
        model.unmerge_adapter()
        assert_same_base(model, state, exactly=False)
        assert distance(logits(model, "llama"), want) < TOLERANCE


@nested
def test_merged_and_unloaded_as_it_answers(methods):
    want = logits(mixed(*methods), "llama")
    for merged_before in (False, True):
        model = mixed(*methods)
        if merged_before:
            model.merge_adapter()
            unloaded = model.unload()
        else:
            unloaded = model.merge_and_unload(progressbar=True, safe_merge=True)
        assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
        assert list(unloaded.state_dict()) == list(build("llama").state_dict())
        assert distance(logits(unloaded, "llama"), want) < TOLERANCE
        assert not hasattr(unloaded, "peft_config")


@nested
def test_every_subset_is_merged_as_it_answers(methods):
    model = mixed(*methods)
    names = [f"a{i}" for i in range(len(methods))]
    for length in range(1, len(names)):
        for active in itertools.combinations(names, length):
            model.set_adapter(list(active))
            want = logits(model, "llama")
            model.merge_adapter()
            assert distance(logits(model, "llama"), want) < TOLERANCE, active
            # PEFT unmerges first
            with pytest.warns(UserWarning, match="Unmerging the model first"):
                model.set_adapter(list(active))
            assert distance(logits(model, "llama"), want) < TOLERANCE, active


@nested
def test_disabled_merged_or_not(methods):
    model = mixed(*methods)
    want, base = logits(model, "llama"), logits(build("llama"), "llama")
    for _ in range(2):
        with model.disable_adapter():
            assert distance(logits(model, "llama"), base) < TOLERANCE
        assert distance(logits(model, "llama"), want) < TOLERANCE
        model.merge_adapter()


@nested
def test_each_can_be_deleted(methods):
    for deleted in range(len(methods)):
        model = mixed(*methods)
        rest = [f"a{i}" for i in range(len(methods)) if i != deleted]
        model.set_adapter(rest)
        want = logits(model, "llama")
        model.delete_adapter(f"a{deleted}")
        assert list(model.peft_config) == rest
        assert torch.equal(logits(model, "llama"), want)
        assert distance(logits(model.merge_and_unload(), "llama"), want) < TOLERANCE


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
@pytest.mark.parametrize("methods", [("dlor", "lora", "output"), ("lora", "dlor", "loha")], ids="-".join)
def test_one_after_the_other_from_the_inside(methods):
    model = mixed(*methods)
    state, want = base_state(model), logits(model, "llama")
    for name in ("a0", "a1", "a2"):
        model.merge_adapter([name])
        assert distance(logits(model, "llama"), want) < TOLERANCE
    model.unmerge_adapter()
    assert_same_base(model, state, exactly=False)


@pytest.mark.parametrize("methods", [("dlor", "lora"), ("lora", "dlor"), ("loha", "dlor", "lora")], ids="-".join)
def test_from_the_outside_is_refused(methods):
    """It would change the answers, and unmerging would not find the base weight again."""
    model = mixed(*methods)
    last = f"a{len(methods) - 1}"
    state, want = base_state(model), logits(model, "llama")
    with pytest.raises(ValueError, match=rf"a0.* must be merged before {last}"):
        model.merge_adapter([last])
    assert_same_base(model, state)
    assert torch.equal(logits(model, "llama"), want)
    # alone it may be
    model.set_adapter(last)
    want = logits(model, "llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match=rf"a0 must be merged before {last}"):
        model.merge_adapter(["a0"])
    assert distance(logits(model, "llama"), want) < TOLERANCE
    model.unmerge_adapter()
    assert_same_base(model, state, exactly=False)


def test_a_part_is_merged_and_the_rest_dropped():
    for name in ("a0", "a1", "a2"):
        model = mixed("dlor", "lora", "output")
        model.set_adapter(name)
        want = logits(model, "llama")
        model = mixed("dlor", "lora", "output")
        assert distance(logits(model.merge_and_unload(adapter_names=[name]), "llama"), want) < TOLERANCE


def test_a_string_is_no_list_of_names():
    model = mixed("dlor", "lora")
    with pytest.raises(TypeError, match="list of strings"):
        model.merge_adapter("a0")


def test_not_a_number_is_found_by_safe_merge():
    model = mixed("dlor", "lora")
    layer = next(iter(layers(model).values()))
    with torch.no_grad():
        layer.dlor_diag["a0"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("outer", ["dora", "shira"])
def test_what_reads_the_base_weight_is_refused_outside(outer):
    model = mixed("dlor", "lora")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"dlor_peft.mixing: .*read the base weight"):
        model.add_adapter("a2", CONFIGS[outer]())
    assert list(model.peft_config) == ["a0", "a1"]
    assert list(model.state_dict()) == keys


def test_a_head_is_unloaded_as_it_was_trained():
    torch.manual_seed(2)
    model = get_peft_model(build("bert"), config_of("bert", modules_to_save=["classifier"]), mixed=True)
    model.add_adapter("lora", LoraConfig(target_modules=["query"], init_lora_weights=False))
    model.set_adapter(["default", "lora"])
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.normal_()
    want = logits(model.eval(), "bert")
    unloaded = model.merge_and_unload()
    assert type(unloaded.classifier) is nn.Linear
    assert distance(logits(unloaded, "bert"), want) < TOLERANCE


def test_embeddings():
    targets = {"target_modules": ["embed_tokens"]}
    lora = LoraConfig(r=2, init_lora_weights=False, **targets)
    for first, second in (
        (config_of("llama", "additive", **targets), lora),
        (lora, config_of("llama", **targets, side="output")),
    ):
        torch.manual_seed(2)
        model = get_peft_model(build("llama"), first, mixed=True)
        model.add_adapter("second", second)
        model.set_adapter(["default", "second"])
        want = logits(model.eval(), "llama")
        assert distance(logits(model.merge_and_unload(), "llama"), want) < TOLERANCE


@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
@pytest.mark.parametrize("other", [LoraConfig, LoHaConfig, LoKrConfig])
def test_convolutions(other, form):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, (3, 1)))

    targets, x = {"r": 2, "target_modules": ["0", "1"]}, torch.randn(2, 3, 5, 5)
    theirs = other(**targets, **{"init_lora_weights" if other is LoraConfig else "init_weights": False})
    ours = config_of("llama", form, **targets)
    for first, second in ((ours, theirs), (theirs, ours)):
        torch.manual_seed(2)
        model = get_peft_model(net(), first, mixed=True)
        model.add_adapter("second", second)
        model.set_adapter(["default", "second"])
        want = model.eval()(x)
        assert distance(want, net()(x)) > 1e-3
        assert distance(model.merge_and_unload()(x), want) < TOLERANCE


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
def test_weights_are_not_tied():
    with pytest.raises(ValueError, match="PeftMixedModel ties no layers"):
        get_peft_model(build("llama"), config_of("llama", ensure_weight_tying=True), mixed=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.attention(x, x, x, need_weights=False)[0])


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
ON_ATTENTION = {
    "dlor": lambda targets: config_of("llama", target_modules=targets),
    "lora": lambda targets: LoraConfig(target_modules=targets, init_lora_weights=False),
}


def on_net(method, targets):
    torch.manual_seed(2)
    return get_peft_model(Net(), ON_ATTENTION[method](targets), adapter_name="a0", mixed=True).eval()


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (["attention"], ["first", "attention", "last"]),
        (["attention.out_proj"], ["first", "attention"]),
        (["attention.out_proj"], "all-linear"),
        (["attention.out_proj"], ".*attention.*"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("first", "second"), [("lora", "dlor"), ("dlor", "lora")])
def test_attention_takes_one_method(first, second, inside, outside):
    model = on_net(first, inside)
    keys, want = list(model.state_dict()), model(X)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"dlor_peft.mixing: 'base_model.model.attention.*nn.MultiheadAttention"):
        model.add_adapter("a1", ON_ATTENTION[second](outside))
    assert list(model.peft_config) == ["a0"]
    assert list(model.state_dict()) == keys
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert torch.equal(model(X), want)


@pytest.mark.parametrize("first", ["attention", "linear"])
def test_attention_beside_another_method(first):
    model = on_net("dlor", ["attention"]) if first == "attention" else on_net("lora", ["first", "last"])
    other = ON_ATTENTION["lora"](["first", "last"]) if first == "attention" else ON_ATTENTION["dlor"](["attention"])
    model.add_adapter("a1", other)
    model.set_adapter(["a0", "a1"])
    want, base = model.eval()(X), Net().eval()(X)
    with model.disable_adapter():
        torch.testing.assert_close(model(X), base)
    model.merge_adapter()
    torch.testing.assert_close(model(X), want)
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), want)
    unloaded = model.merge_and_unload()
    assert list(unloaded.state_dict()) == list(Net().state_dict())
    torch.testing.assert_close(unloaded(X), want)


def test_attention_unloaded_is_the_base_model():
    unloaded = on_net("dlor", ["attention"]).unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")
    torch.testing.assert_close(unloaded(X), Net().eval()(X))


@pytest.mark.parametrize("target", ["attention", "attention.out_proj"])
def test_attention_of_a_model_that_peft_has_wrapped_before(target):
    lora = get_peft_model(Net(), ON_ATTENTION["lora"]([target]))
    with (
        pytest.warns(UserWarning, match="second time|Already found"),
        pytest.raises(ValueError, match=r"adapter of another method.*The target is 'attention"),
    ):
        get_peft_model(lora.base_model.model, ON_ATTENTION["dlor"](["attention", "attention.out_proj"]))


def test_parameters_take_one_method():
    ours = config_of("llama", target_modules=[], target_parameters=["first.weight"])
    theirs = LoraConfig(target_modules=[], target_parameters=["first.weight"], init_lora_weights=False)
    for first, second in ((ours, theirs), (theirs, ours)):
        model = get_peft_model(Net(), first, mixed=True)
        assert isinstance(model, PeftMixedModel)
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match="'default' has target_parameters, too"):
            model.add_adapter("second", second)
        assert list(model.state_dict()) == keys


def test_a_merge_that_one_layer_refuses_is_taken_back():
    torch.manual_seed(0)
    net, config = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config_of("llama", target_modules=["0", "1"])
    model = get_peft_model(net, config, mixed=True)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    model.set_adapter(["default", "second"])
    x = torch.randn(3, 4)
    broken = next(iter(layers(model).values()))
    kept = broken.dlor_U["default"].weight.data.clone()
    want = model(x)
    broken.dlor_U["default"].weight.data[:] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected"):
            merge(safe_merge=True)
        assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
    broken.dlor_U["default"].weight.data = kept
    assert distance(model(x), want) < 1e-5
