"""After a swap the config is that of the tensors: saved and loaded, the model answers as before."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import hotswap
from swapping import make, saved, swap
from tiny_models import FORMS, adapter_parameters, build, config_of, distance, layers, logits
from torch import nn

WITHOUT_RANK = [form for form, fields in FORMS.items() if fields.get("r", 3) == 0]
SWAPS = {
    "more everywhere": ({"r": 2}, {"r": 5}),
    "more in one": ({"r": 2}, {"r": 2, "rank_pattern": {"q_proj": 4}}),
    "more by a regex": (
        {"r": 2},
        {"r": 1, "rank_pattern": {r"layers\.\d\.mlp\..*": 6, "layers.0.self_attn.q_proj": 3}},
    ),
    "more where there was a pattern": ({"r": 3, "rank_pattern": {".*_proj": 1, "nothing": 7}}, {"r": 2}),
    "none in some": ({"r": 3, "rank_pattern": {"up_proj": 0}}, {"r": 2}),
    "none at all": ({"r": 0}, {"r": 2, "rank_pattern": {"down_proj": 4, "q_proj": 0}}),
    "none in the other": ({"r": 2}, {"r": 0}),
    "fewer layers": ({"r": 2}, {"r": 4, "target_modules": ["q_proj"]}),
}


def reloaded(model, path, **kwargs):
    return PeftModel.from_pretrained(build("llama"), saved(model, path), **kwargs).eval()


@pytest.mark.parametrize("ranks", SWAPS)
@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_a_swapped_model_can_be_saved(form, ranks, tmp_path):
    here, there = SWAPS[ranks]
    model, other = make(form, seed=2, **here), make(form, **there)
    swap(model, saved(other, tmp_path / "other"))
    want = logits(other, "llama")
    assert distance(logits(model, "llama"), want) < 1e-6
    again = reloaded(model, tmp_path / "again")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    assert {name: layer.r for name, layer in layers(again).items()} == {
        name: layer.r for name, layer in layers(model).items()
    }
    # and swapped back, in what is compiled to the same shapes
    swap(again, tmp_path / "other")
    assert distance(logits(again, "llama"), want) < 1e-6


def test_a_config_that_fits_is_left_alone(tmp_path):
    pattern = {"q_proj": 5, r"layers\.1\..*": 4}
    model = make(r=3, rank_pattern=dict(pattern))
    swap(model, saved(make(r=2), tmp_path))
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) == (3, pattern)


def test_one_rank_needs_no_pattern(tmp_path):
    model = make(r=3, rank_pattern={"q_proj": 1})
    swap(model, saved(make(r=4), tmp_path))
    config = model.peft_config["default"]
    assert (config.r, config.rank_pattern) == (4, {})


def test_names_that_end_with_one_another(tmp_path):
    """A pattern means all names that end with it, so the longer ones come first, and those of the general rank too."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.ModuleDict({"x": nn.Linear(4, 4)}) for _ in range(3))
            self.x = nn.Linear(4, 4)

        def forward(self, t):
            return self.x(self.c["x"](self.b["x"](self.a["x"](t))))

    def adapted(**changes):
        return get_peft_model(Net(), config_of("llama", **{"target_modules": ["x"], "r": 2, **changes}))

    model, other = adapted(), adapted(rank_pattern={"a.x": 4, "b.x": 2, "c.x": 2, "x": 3})
    swap(model, saved(other, tmp_path / "other"))
    again = PeftModel.from_pretrained(Net(), saved(model, tmp_path / "again"))
    assert torch.equal(again(torch.ones(2, 4)), other(torch.ones(2, 4)))


@pytest.mark.parametrize("where", ["compiled", "part", "wrapped", "base model", "injected"])
def test_the_config_is_found(where, tmp_path):
    other = make(r=5)
    tensors = {name: value.detach() for name, value in adapter_parameters(other).items()}
    config = config_of("llama", r=2)
    if where == "injected":
        model = inject_adapter_in_model(config, build("llama"))
        tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        given = model
    else:
        model = given = get_peft_model(build("llama"), config)
        if where == "compiled":
            given = torch.compile(model, backend="eager")
        elif where == "part":
            model.base_model.model.model.layers[0] = torch.compile(
                model.base_model.model.model.layers[0], backend="eager"
            )
        elif where == "wrapped":
            given = nn.ModuleDict({"module": model})
            tensors = {f"module.{name}": value for name, value in tensors.items()}
        elif where == "base model":
            given = model.base_model.model
            tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    hotswap.hotswap_adapter_from_state_dict(given, tensors, "default", other.peft_config["default"])
    assert (config.r, config.rank_pattern) == (5, {})


def test_a_part_of_the_model_has_no_config():
    model, other = make(r=2), make(r=5)
    part, source = model.base_model.model.model, other.base_model.model.model
    hotswap.hotswap_adapter_from_state_dict(part, adapter_parameters(source), "default", other.peft_config["default"])
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    assert model.peft_config["default"].r == 2


def test_the_other_adapters_config_stays(tmp_path):
    model = make(r=2)
    model.add_adapter("second", config_of("llama", r=2))
    swap(model, saved(make(r=4), tmp_path), "second")
    assert (model.peft_config["default"].r, model.peft_config["second"].r) == (2, 4)
    assert all(layer.r == {"default": 2, "second": 4} for layer in layers(model).values())


@pytest.mark.parametrize("form", WITHOUT_RANK)
def test_layers_without_a_rank_get_one(form, tmp_path):
    model, other = make(form, seed=2), make(form, r=3)
    swap(model, saved(other, tmp_path))
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    model.merge_adapter()
    assert distance(logits(model, "llama"), logits(other, "llama")) < 1e-5
    # as what was there is
    assert all(parameter.requires_grad for parameter in adapter_parameters(model).values())


@pytest.mark.parametrize("told", [False, True])
def test_prepared_layers_without_a_rank_get_one(told, tmp_path):
    model = make(r=2, rank_pattern={"q_proj": 0, "up_proj": 3})
    before = logits(model, "llama")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4, **({"config": model.peft_config} if told else {}))
    assert distance(logits(model, "llama"), before) < 1e-6
    assert all(layer.r == {"default": 4} for layer in layers(model).values())
    assert torch.equal(logits(reloaded(model, tmp_path), "llama"), logits(model, "llama"))
    pointers = [parameter.data_ptr() for parameter in adapter_parameters(model).values()]
    other = make(r=4)
    swap(model, saved(other, tmp_path / "other"))
    assert torch.equal(logits(model, "llama"), logits(other, "llama"))
    assert [parameter.data_ptr() for parameter in adapter_parameters(model).values()] == pointers


def test_preparing_for_a_smaller_rank_changes_nothing():
    model = make(r=2, rank_pattern={"q_proj": 5})
    shapes = {name: value.shape for name, value in adapter_parameters(model).items()}
    with pytest.raises(ValueError, match=r"target rank 4.*larger \(5\)"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=4, config=model.peft_config)
    assert {name: value.shape for name, value in adapter_parameters(model).items()} == shapes
    assert (model.peft_config["default"].r, model.peft_config["default"].rank_pattern) == (2, {"q_proj": 5})
