"""DLoRConfig: what it refuses and how it says so, and what survives the way to disk and back."""

import dataclasses
import json

import pytest
from peft import PeftConfig
from peft.utils.peft_types import PeftType

import dlor_peft
from dlor_peft import DLoRConfig
from dlor_peft.config import PATTERNS

OWN_FIELDS = [
    field
    for field in dataclasses.fields(DLoRConfig)
    if field.name not in {f.name for f in dataclasses.fields(PeftConfig)}
]

BAD_VALUES = [
    ({"mode": "multiplicatve"}, ValueError, r"'additive', 'scaled', 'multiplicative'.*Did you mean 'multiplicative'"),
    ({"mode": "lora"}, ValueError, r"mode must be one of .*'lora'"),
    ({"mode": None}, ValueError, r"mode must be one of"),
    ({"mode": ["scaled"]}, ValueError, r"mode must be one of"),
    ({"side": "outputs"}, ValueError, r"side must be .*Did you mean 'output'"),
    ({"side": "left"}, ValueError, r"side must be one of 'input', 'output', 'both', 'auto'"),
    ({"diagonal": "vectors"}, ValueError, r"diagonal must be .*Did you mean 'vector'"),
    ({"diagonal": None}, ValueError, r"diagonal must be one of"),
    ({"diagonal": True}, ValueError, r"diagonal must be one of"),
    ({"bias": "lora_only"}, ValueError, r"bias must be .*Did you mean 'dlor_only'"),
    ({"bias": False}, ValueError, r"bias must be one of"),
    ({"r": -1}, ValueError, r"r must be an integer of at least 0, but it is -1"),
    ({"r": 2.0}, TypeError, r"r must be an integer, but it is 2.0"),
    ({"r": True}, TypeError, r"r must be an integer, but it is True"),
    ({"r": "8"}, TypeError, r"r must be an integer, but it is '8'"),
    ({"r": None}, TypeError, r"r must be an integer"),
    ({"mode": "multiplicative", "depth": 0}, ValueError, r"depth must be an integer of at least 1"),
    ({"mode": "multiplicative", "depth": 1.5}, TypeError, r"depth must be an integer"),
    ({"mode": "multiplicative", "depth": "2"}, TypeError, r"depth must be an integer"),
    ({"rank_pattern": {"q": -1}}, ValueError, r"rank_pattern\['q'\] must be an integer of at least 0"),
    ({"rank_pattern": {"q": 1.0}}, TypeError, r"rank_pattern\['q'\] must be an integer"),
    ({"rank_pattern": {"q": None}}, TypeError, r"rank_pattern\['q'\] must be an integer"),
    ({"mode": "multiplicative", "depth_pattern": {"q": 0}}, ValueError, r"depth_pattern\['q'\] must be .*at least 1"),
    ({"mode": "multiplicative", "depth_pattern": {"q": "2"}}, TypeError, r"depth_pattern\['q'\] must be an integer"),
    ({"mode_pattern": {"q": "scale"}}, ValueError, r"mode_pattern\['q'\] must be one of .*Did you mean 'scaled'"),
    ({"mode_pattern": {"q": None}}, ValueError, r"mode_pattern\['q'\] must be one of"),
    ({"mode_pattern": {"q(": "scaled"}}, ValueError, r"mode_pattern must be a regex"),
    ({"side_pattern": {"q": "inputs"}}, ValueError, r"side_pattern\['q'\] must be one of .*Did you mean 'input'"),
    ({"side_pattern": {1: "input"}}, TypeError, r"side_pattern must be a module name or a regex"),
    ({"dlor_dropout": -0.1}, ValueError, r"dlor_dropout must be at least 0 and below 1"),
    ({"dlor_dropout": 1}, ValueError, r"dlor_dropout must be at least 0 and below 1"),
    ({"dlor_dropout": float("nan")}, ValueError, r"dlor_dropout must be at least 0 and below 1"),
    ({"dlor_dropout": "0.1"}, TypeError, r"dlor_dropout must be a number"),
    ({"target_modules": 5}, TypeError, r"target_modules must be a list, each item a string, or a string alone"),
    ({"exclude_modules": ["a", 1]}, TypeError, r"exclude_modules must be a list, each item a string"),
    ({"modules_to_save": "classifier"}, TypeError, r"modules_to_save must be a list, each item a string.*as a list"),
    ({"layers_to_transform": "0"}, TypeError, r"layers_to_transform must be a list, each item a layer index"),
    ({"layers_to_transform": [0], "layers_pattern": 5}, TypeError, r"layers_pattern must be a list"),
    ({"trainable_token_indices": "a"}, TypeError, r"trainable_token_indices must be a list, each item a token id"),
    ({"trainable_token_indices": {"wte": ["a"]}}, TypeError, r"trainable_token_indices must be a list"),
    ({"fan_in_fan_out": "yes"}, TypeError, r"fan_in_fan_out must be True or False"),
    ({"dlor_dropout": True}, TypeError, r"dlor_dropout must be a number"),
    ({"dlor_dropout": None}, TypeError, r"dlor_dropout must be a number"),
    ({"init_weights": "gaussian"}, ValueError, r"init_weights must be one of 'svd', but it is 'gaussian'"),
    ({"init_weights": "SVD"}, ValueError, r"init_weights must be one of 'svd'"),
    ({"init_weights": None}, TypeError, r'init_weights must be True, False or "svd"'),
    ({"init_weights": 1}, TypeError, r'init_weights must be True, False or "svd"'),
]  # fmt: skip

BAD_COMBINATIONS = [
    ({"r": 0, "diagonal": "none"}, r"r=0 .*nothing to train.*Give r >= 1"),
    ({"diagonal": "none", "rank_pattern": {"q": 0}}, r"nothing to train.*rank_pattern"),
    ({"depth": 2}, r'depth=2 needs mode="multiplicative".*Use r=16 with depth=1'),
    ({"mode": "additive", "depth": 3, "r": 4}, r'depth=3 needs mode="multiplicative".*Use r=12'),
    ({"mode": "additive", "depth_pattern": {"q": 2}}, r'depth=2 needs mode="multiplicative"'),
    ({"depth_pattern": {"q": 4}}, r'depth=4 needs mode="multiplicative"'),
    ({"mode": "multiplicative", "side": "both"}, r'side="both" needs mode="scaled".*Use side="input"'),
    ({"mode": "additive", "side": "both"}, r'side="both" needs mode="scaled"'),
    ({"mode": "additive", "side": "input"}, r'side=\'input\' has no meaning in mode "additive".*Leave side="auto"'),
    ({"mode": "additive", "side": "output"}, r'side=\'output\' has no meaning in mode "additive"'),
    ({"diagonal": "none", "side": "input"}, r'no meaning in mode "scaled" with diagonal="none".*Leave side="auto"'),
    ({"diagonal": "none", "side": "output"}, r'no meaning in mode "scaled" with diagonal="none"'),
    ({"diagonal": "none", "side": "both"}, r'no meaning in mode "scaled" with diagonal="none"'),
    ({"mode_pattern": {"q": "additive"}, "depth_pattern": {"q": 2}}, r'depth=2 needs mode="multiplicative"'),
    ({"mode": "additive", "side_pattern": {"q": "both"}}, r'side="both" needs mode="scaled"'),
    ({"mode": "additive", "side_pattern": {"q": "input"}}, r"side='input' has no meaning in mode \"additive\""),
    ({"diagonal": "none", "side_pattern": {"q": "input"}}, r'no meaning in mode "scaled" with diagonal="none"'),
    ({"target_modules": ".*q", "layers_to_transform": [0]}, r"`layers_to_transform` cannot be used when .* is a str"),
    ({"target_modules": ".*q", "layers_pattern": "h"}, r"`layers_pattern` cannot be used when .* is a str"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, r"`layers_to_transform` must also be specified"),
    ({"layers_pattern": ["h"]}, r"`layers_to_transform` must also be specified"),
]  # fmt: skip

GOOD = [
    {},
    {"r": 0},
    {"r": 0, "diagonal": "scalar", "mode": "additive"},
    {"diagonal": "none"},
    {"side": "both", "diagonal": "scalar"},
    {"mode": "multiplicative", "diagonal": "none", "side": "input", "depth": 4},
    {"mode": "multiplicative", "depth_pattern": {"q": 2}, "rank_pattern": {"q": 0}},
    {"mode": "additive", "depth_pattern": {"q": 1}},
    {"mode": "multiplicative", "depth": 2, "mode_pattern": {"q": "scaled"}, "depth_pattern": {"q": 1}},
    {"mode_pattern": {"q": "multiplicative"}, "depth_pattern": {"q": 3}},
    {"mode": "additive", "mode_pattern": {"q": "scaled"}, "side_pattern": {"q": "both"}},
    {"dlor_dropout": 0},
    {"init_weights": "svd"},
    {"init_weights": False},
    {"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"},
    {"target_modules": ["q"], "layers_to_transform": [0, 2]},
]


@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES, ids=str)
def test_a_bad_value_is_refused(values, error, message):
    with pytest.raises(error, match=message) as caught:
        DLoRConfig(**values)
    assert str(caught.value).startswith("dlor_peft.config: ")


@pytest.mark.parametrize(("values", "message"), BAD_COMBINATIONS, ids=str)
def test_a_combination_without_meaning_is_refused(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        DLoRConfig(**values)
    assert str(caught.value).startswith("dlor_peft.config: ")


@pytest.mark.parametrize(
    "values",
    [{"rank_pattern": ["q"]}, {"rank_pattern": "q"}, {"depth_pattern": [("q", 1)]}, {"mode_pattern": "additive"}],
    ids=str,
)
def test_a_pattern_that_is_no_dict_is_refused(values):
    with pytest.raises(TypeError, match=next(iter(values))):
        DLoRConfig(**values)


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_a_good_config_survives_the_disk(values, tmp_path):
    config = DLoRConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is DLoRConfig
    assert loaded.to_dict() == config.to_dict()


def test_every_field_survives_the_disk(tmp_path):
    values = {
        "r": 5, "mode": "multiplicative", "side": "output", "depth": 2, "diagonal": "scalar", "dlor_dropout": 0.25,
        "init_weights": False, "target_modules": ["q", "v"], "exclude_modules": ["lm_head"],
        "modules_to_save": ["head"],
        "layers_to_transform": [0, 1], "layers_pattern": ["layers"], "rank_pattern": {"q": 0},
        "depth_pattern": {"v": 3}, "mode_pattern": {"v": "scaled"},
        "side_pattern": {"k": "input"}, "bias": "dlor_only", "fan_in_fan_out": True,
        "trainable_token_indices": {"embed": [1, 2]},
        "target_parameters": ["experts.down_proj"], "ensure_weight_tying": True, "dlor_version": "0.0.9",
    }  # fmt: skip
    assert set(values) == {field.name for field in OWN_FIELDS}
    config = DLoRConfig(**values, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    for name, value in values.items():
        assert getattr(config, name) != OWN_DEFAULTS[name], name
        assert getattr(loaded, name) == (set(value) if name in ("target_modules", "exclude_modules") else value), name
    assert loaded.task_type == "CAUSAL_LM"
    assert loaded.peft_type is PeftType("DLOR")


OWN_DEFAULTS = {field.name: getattr(DLoRConfig(), field.name) for field in OWN_FIELDS} | {"dlor_version": None}


def test_json_names_the_method_and_its_version(tmp_path):
    DLoRConfig(target_modules=["b", "a"]).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "DLOR"
    assert stored["dlor_version"] == dlor_peft.__version__
    assert sorted(stored["target_modules"]) == ["a", "b"]


def test_lists_become_sets_and_patterns_stay():
    config = DLoRConfig(target_modules=["q", "v", "q"], exclude_modules=["k"])
    assert config.target_modules == {"q", "v"}
    assert config.exclude_modules == {"k"}
    assert DLoRConfig(target_modules="all-linear").target_modules == "all-linear"
    assert DLoRConfig(exclude_modules=".*k").exclude_modules == ".*k"


def test_none_for_a_pattern_means_no_exceptions():
    config = DLoRConfig(**dict.fromkeys(PATTERNS.values()))
    assert all(getattr(config, name) == {} for name in PATTERNS.values())


def test_the_values_of_a_layer():
    config = DLoRConfig(
        mode="multiplicative", r=4, depth=2, target_modules=["q", "k", "v"],
        mode_pattern={"layers.0.q|k": "scaled", "layers.1.q": "additive"}, side_pattern={"k": "both"},
        rank_pattern={"k": 1, r"layers\.\d\.k": 2}, depth_pattern={"q|k": 1, "v": 3},
    )  # fmt: skip

    def of(name):
        layer = config.for_layer(name)
        assert layer.target_modules == config.target_modules
        assert not any(getattr(layer, name) for name in PATTERNS.values())
        return layer.mode, layer.side, layer.r, layer.depth

    assert of("model.layers.0.q") == ("scaled", "auto", 4, 1)
    assert of("model.layers.1.q") == ("additive", "auto", 4, 1)
    assert of("layers.1.k") == ("scaled", "both", 1, 1)
    assert of("v") == ("multiplicative", "auto", 4, 3)
    assert of("other") == ("multiplicative", "auto", 4, 2)
    assert config.mode == "multiplicative"
    assert len(config.mode_pattern) == 2


def test_values_of_a_layer_that_have_no_meaning_together():
    config = DLoRConfig(mode="multiplicative", depth=2, mode_pattern={"q": "scaled"})
    with pytest.raises(ValueError, match=r"depth=2 needs.*give the layer 'a\.q': name it in .*depth_pattern"):
        config.for_layer("a.q")


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda field: field.name)
def test_every_own_field_has_help_in_one_line(field):
    text = field.metadata["help"]
    assert len(text) > 10
    assert "\n" not in text
    assert text == text.strip()


def test_defaults_are_those_of_the_design():
    config = DLoRConfig()
    assert (config.mode, config.side, config.diagonal, config.depth, config.r) == ("scaled", "auto", "vector", 1, 8)
    assert config.dlor_dropout == 0
    assert config.bias == "none"
    assert config.init_weights is True


def test_the_message_suggests_a_config_that_is_accepted():
    """r=16, depth=1 is what the refusal of depth=2, r=8 proposes."""
    assert DLoRConfig(r=16, depth=1).r == 16
    assert DLoRConfig(depth=2, mode="multiplicative").depth == 2
