"""add_weighted_adapter, "cat": exactly W + sum_i w_i (W'_i - W)."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import adapted, add, build, config_of, distance, inputs, layers, logits

WEIGHTS = [0.7, -0.4]

# two forms that "cat" can join, with changes to each
PAIRS = [
    ("additive", {}, "additive", {"r": 5}),
    ("additive", {}, "additive-scalar", {}),
    ("additive-none", {}, "additive-r0", {}),
    ("additive-r0", {}, "additive-r0", {}),
    ("scaled", {}, "scaled", {"r": 1}),
    ("scaled-input", {}, "scaled-input", {"diagonal": "scalar"}),
    ("scaled-output", {}, "scaled-output-scalar", {}),
    ("scaled-none", {}, "scaled-output", {}),
    ("scaled-none", {}, "scaled-none", {"r": 6}),
    ("multiplicative", {}, "multiplicative", {"diagonal": "scalar"}),
    ("multiplicative-input-3", {}, "multiplicative-none-2", {}),
    ("multiplicative-output-3", {}, "multiplicative-scalar-2", {"r": 2}),
    ("multiplicative-r0-2", {}, "multiplicative", {"depth": 3}),
]


def deltas(model, names):
    return {key: [layer.get_delta_weight(n) for n in names if n in layer.form] for key, layer in layers(model).items()}


def check_sum(model, names=("default", "second"), weights=WEIGHTS, new="sum", tolerance=1e-5):
    """The update of `new` on every layer, in float32 or wider, is the weighted sum of those of `names`."""
    for key, layer in layers(model).items():
        parts = [w * layer.delta_matrix(n) for n, w in zip(names, weights, strict=True) if n in layer.form]
        if not parts:
            assert new not in layer.form, key
            continue
        assert distance(layer.delta_matrix(new), sum(parts)) < tolerance, key


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("first", "changes", "second", "others"), PAIRS)
def test_the_sum_is_exact(kind, first, changes, second, others):
    model = adapted(kind, first, **changes)
    add(model, "second", kind, second, **others)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)
    model.set_adapter("sum")
    want = logits(model, kind)
    model.merge_adapter()
    assert distance(logits(model, kind), want) < 1e-5


@pytest.mark.parametrize("form", ["additive", "scaled", "multiplicative-output-3"])
def test_scales_count(form):
    model = adapted("llama", form)
    add(model, "second", "llama", form)
    for layer in layers(model).values():
        layer.set_scale("default", 0.5)
        layer.set_scale("second", -3.0)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)
    assert all(layer.scaling["sum"] == 1 for layer in layers(model).values())


@pytest.mark.parametrize("init_weights", [True, False])
def test_layers_that_only_one_adapter_has(init_weights):
    """A layer whose adapter has no diagonal, or no low-rank part, must not start the missing part at random."""
    model = get_peft_model(
        build("llama"), config_of("llama", "additive-none", target_modules=["q_proj", "up_proj"])
    ).eval()
    add(model, "second", "llama", "additive-r0", target_modules=["up_proj", "down_proj"])
    for config in model.peft_config.values():
        config.init_weights = init_weights
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)


def test_a_scalar_fills_the_vector_of_a_layer_that_has_no_other():
    model = get_peft_model(build("llama"), config_of("llama", "additive-scalar", target_modules=["q_proj"]))
    add(model, "second", "llama", "additive", target_modules=["down_proj"])
    model.eval().add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)


def test_only_the_adapted_layers_get_the_sum():
    """A target name that is also the end of a longer name must not adapt the longer one."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, 4)
            self.block = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.head(self.block["head"](x))

    torch.manual_seed(0)
    model = get_peft_model(Net(), config_of("llama", "additive", target_modules="head"))
    assert list(layers(model)) == ["base_model.model.head"]
    model.add_weighted_adapter(["default"], [0.5], "part", combination_type="cat")
    assert list(layers(model)) == ["base_model.model.head"]


def test_one_adapter_three_adapters_and_the_same_twice():
    model = adapted("llama", "multiplicative-input-3")
    for seed, name in enumerate(["second", "third"]):
        add(model, name, "llama", "multiplicative-input-3", seed=seed + 10)
    names, weights = ["default", "second", "third"], [1.0, 0.5, -2.0]
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    check_sum(model, names, weights)
    model.add_weighted_adapter(["third"], [1.0], "copy", combination_type="cat")
    check_sum(model, ["third"], [1.0], "copy")
    model.add_weighted_adapter(["third", "third"], [1.0, 1.0], "twice", combination_type="cat")
    check_sum(model, ["third", "third"], [1.0, 1.0], "twice")
    model.add_weighted_adapter(["sum", "copy"], [1.0, 2.0], "of sums", combination_type="cat")
    check_sum(model, ["sum", "copy"], [1.0, 2.0], "of sums", 1e-4)


def test_the_new_adapter_is_frozen_and_inactive():
    model = adapted("llama")
    want = logits(model, "llama")
    add(model, "second", "llama", "scaled")
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    assert model.active_adapters == ["default"]
    assert distance(logits(model, "llama"), want) == 0
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    assert all(p.requires_grad for name, p in model.named_parameters() if "dlor_" in name and ".default." in name)
    model.set_adapter("sum")
    model(**inputs("llama")).logits.sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if ".sum." in name]
    assert all(grad.isfinite().all() for grad in grads)


def test_the_sum_survives_the_disk(tmp_path):
    model = adapted(
        "llama", "multiplicative-output-3", target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 1}
    )
    add(model, "second", "llama", "multiplicative-output-3", target_modules=r".*layers\.1\.mlp\.down_proj")
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    model.set_adapter("sum")
    want = logits(model, "llama")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "sum").eval()
    assert distance(logits(loaded, "llama"), want) < 1e-6


def test_a_module_saved_in_full_by_one_adapter_is_taken_over():
    model = adapted("bert", modules_to_save=["classifier"])
    add(model, "second", "bert", "scaled")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.fill_(0.25)
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)
    model.set_adapter("sum")
    assert (model.base_model.model.classifier.modules_to_save["sum"].weight == 0.25).all()
    assert model.base_model.model.classifier.active_adapters == ["sum"]


def test_half_precision_adapters_are_summed_in_float32():
    model = adapted("llama", "multiplicative-input-3").to(torch.bfloat16)
    add(model, "second", "llama", "multiplicative-input-3")
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
def test_a_sum_while_merged_is_the_sum_of_the_unmerged():
    model = adapted("llama", "scaled")
    add(model, "second", "llama", "scaled")
    model.merge_adapter()
    model.add_weighted_adapter(["default", "second"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)
