"""Models that accelerate offloads to the memory of the CPU or to disk: the weights are meta tensors between calls."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import (
    FEW_FORMS,
    adapted,
    adapter_parameters,
    add,
    base_parameters,
    build,
    config_of,
    distance,
    inputs,
    layers,
    logits,
)
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dlor_peft import DLoRConfig

SOME = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}

# a layer with hooks is called, one without is fused with its update: the same sums in another order
ROUNDING = 1e-5

WAYS = ["cpu_offload", "disk_offload", "dispatch_model", "from_pretrained"]


@pytest.fixture
def offloaded(tmp_path):
    """A Llama with offloaded weights, by the way it came to be."""

    def make(way, **config):
        model, folder = build("llama", **config), tmp_path / f"offload-{way}"
        if way == "cpu_offload":
            return cpu_offload(model, execution_device="cpu")
        if way == "disk_offload":
            return disk_offload(model, folder, execution_device="cpu")
        if way == "dispatch_model":
            return dispatch_model(model, dict(SOME), main_device="cpu", offload_dir=folder)
        model.save_pretrained(tmp_path / "base")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=dict(SOME), offload_folder=folder)

    return make


def adapt(model, form="scaled-both", **changes):
    torch.manual_seed(2)
    return get_peft_model(model, config_of("llama", form, **changes)).eval()


def is_offloaded(model):
    return any(parameter.is_meta for parameter in base_parameters(model).values())


def train(model, steps=2):
    """Losses and the largest gradient of each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs("llama")).logits.square().mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("form", FEW_FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_a_new_adapter_is_where_the_layer_runs(way, form, offloaded, tmp_path):
    model, want = adapt(offloaded(way), form), adapted("llama", form)
    assert is_offloaded(model)
    assert {parameter.device.type for parameter in adapter_parameters(model).values()} == {"cpu"}
    assert distance(logits(model, "llama"), logits(want, "llama")) < ROUNDING
    assert train(model) == pytest.approx(train(want), rel=ROUNDING)
    after = logits(want, "llama")
    assert distance(logits(model, "llama"), after) < ROUNDING
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    assert distance(logits(loaded, "llama"), after) < ROUNDING


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_added_and_loaded_beside_one(way, low_cpu_mem_usage, offloaded, tmp_path):
    saved = adapted("llama", "multiplicative-output-3")
    saved.save_pretrained(tmp_path / "adapter")
    model = adapt(offloaded(way))
    before = logits(model, "llama")
    add(model, "second", "llama", "additive")
    model.load_adapter(tmp_path / "adapter", "third", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.is_meta for parameter in adapter_parameters(model).values())
    assert torch.equal(logits(model, "llama"), before)
    model.set_adapter("third")
    assert distance(logits(model, "llama"), logits(saved, "llama")) < ROUNDING


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_from_pretrained_on_an_offloaded_model(way, low_cpu_mem_usage, offloaded, tmp_path):
    saved = adapted("llama", "scaled-both")
    saved.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(offloaded(way), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert is_offloaded(model)
    assert distance(logits(model, "llama"), logits(saved, "llama")) < ROUNDING


# the copy of the adapter that is not used
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter in the checkpoint to a meta:UserWarning")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("folder", ["offload_folder", "offload_dir"])
def test_from_pretrained_that_dispatches_anew(folder, low_cpu_mem_usage, offloaded, tmp_path, monkeypatch):
    """PEFT writes the adapter to disk beside the weights; saving and merging read it from there."""
    # the folder is joined to the working directory without its root
    monkeypatch.chdir(tmp_path)
    saved = adapted("llama", "scaled-both")
    saved.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(
        offloaded("from_pretrained"),
        tmp_path / "adapter",
        low_cpu_mem_usage=low_cpu_mem_usage,
        device_map={f"base_model.model.{name}": device for name, device in SOME.items()},
        **{folder: tmp_path / "offload"},
    )
    assert any(parameter.is_meta for parameter in adapter_parameters(model).values())
    want = logits(saved, "llama")
    assert distance(logits(model, "llama"), want) < ROUNDING
    model.save_pretrained(tmp_path / "again")
    stored, first = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "adapter"))
    assert stored.keys() == first.keys()
    assert all(torch.equal(stored[key], first[key]) for key in first)
    model.merge_adapter()
    saved.merge_adapter()
    assert torch.equal(logits(model, "llama"), logits(saved, "llama"))
    model.unmerge_adapter()
    assert distance(logits(model, "llama"), want) < ROUNDING


@pytest.mark.parametrize("form", FEW_FORMS)
@pytest.mark.parametrize("way", WAYS)
def test_merging_is_what_it_is_in_memory(way, form, offloaded):
    model, want = adapt(offloaded(way), form), adapted("llama", form)
    base, unmerged = logits(build("llama"), "llama"), logits(want, "llama")
    for one in (model, want):
        add(one, "second", "llama", "additive")
        one.merge_adapter()
    assert is_offloaded(model)
    assert torch.equal(logits(model, "llama"), logits(want, "llama"))
    for one in (model, want):
        with pytest.warns(UserWarning, match="additionally merging second"):
            one.merge_adapter(["second"])
    assert torch.equal(logits(model, "llama"), logits(want, "llama"))
    model.unmerge_adapter()
    assert is_offloaded(model)
    assert distance(logits(model, "llama"), unmerged) < ROUNDING
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), base)


@pytest.mark.parametrize("way", WAYS)
def test_layers_merge_and_unmerge_without_peft_bringing_them_in(way, offloaded):
    model, want = adapt(offloaded(way)), adapted("llama", "scaled-both")
    unmerged = logits(want, "llama")
    for one in (model, want):
        for layer in layers(one).values():
            layer.merge(safe_merge=True)
    assert torch.equal(logits(model, "llama"), logits(want, "llama"))
    # disabling a merged layer unmerges it in its call
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))
    assert distance(logits(model, "llama"), unmerged) < ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_the_update_is_read_off_an_offloaded_weight(way, offloaded):
    model, want = adapt(offloaded(way)), adapted("llama", "scaled-both")
    for name, layer in layers(model).items():
        assert torch.equal(layer.get_delta_weight("default"), layers(want)[name].get_delta_weight("default"))
    model.add_weighted_adapter(["default"], [0.5], "blend", combination_type="svd", svd_rank=8)
    want.add_weighted_adapter(["default"], [0.5], "blend", combination_type="svd", svd_rank=8)
    for one in (model, want):
        one.set_adapter("blend")
    assert distance(logits(model, "llama"), logits(want, "llama")) < 1e-6


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["dispatch_model", "from_pretrained"])
def test_a_merged_model_is_saved_as_a_plain_one(way, dtype, offloaded, tmp_path):
    model, want = adapt(offloaded(way, dtype=dtype)), adapted("llama", "scaled-both")
    if dtype is not torch.float32:
        want = adapt(build("llama", dtype=dtype))
    want = want.merge_and_unload()
    merged = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged, "llama"), logits(want, "llama"))
    merged.save_pretrained(tmp_path / "merged", max_shard_size="4KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    assert reloaded.keys() == want.state_dict().keys()
    assert all(torch.equal(value, want.state_dict()[name]) for name, value in reloaded.items())


@pytest.mark.parametrize("way", WAYS)
def test_unload_gives_the_offloaded_base_back(way, offloaded):
    model = adapt(offloaded(way))
    model.merge_adapter()
    model.unmerge_adapter()
    model = model.unload()
    assert not layers(model)
    assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))


def test_a_merged_model_that_is_no_longer_offloaded_keeps_what_was_merged(offloaded):
    model, want = adapt(offloaded("cpu_offload")), adapted("llama", "scaled-both")
    for one in (model, want):
        one.merge_adapter()
    remove_hook_from_module(model.get_base_model(), recurse=True)
    assert not is_offloaded(model)
    assert torch.equal(logits(model, "llama"), logits(want, "llama"))
    model.unmerge_adapter()
    want.unmerge_adapter()
    assert distance(logits(model, "llama"), logits(want, "llama")) < ROUNDING


@pytest.mark.parametrize("way", WAYS)
def test_a_merged_model_saves_its_adapter_and_the_embedding_as_it_was(way, offloaded, tmp_path):
    changes = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    form = "scaled-output"
    model, want = adapt(offloaded(way), form, **changes), adapted("llama", form, **changes)
    saved = {}
    for name, one in (("offloaded", model), ("memory", want)):
        one.merge_adapter()
        with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
            one.save_pretrained(tmp_path / name)
        saved[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert saved["offloaded"].keys() == saved["memory"].keys()
    assert any("embed_tokens.base_layer" in key for key in saved["memory"])
    assert all(torch.equal(saved["offloaded"][key], value) for key, value in saved["memory"].items())


@pytest.mark.parametrize("way", WAYS)
def test_modules_to_save_are_trained_and_come_back(way, offloaded, tmp_path):
    changes = {"modules_to_save": ["lm_head"]}
    model, want = adapt(offloaded(way), **changes), adapted("llama", "scaled-both", **changes)
    assert train(model) == pytest.approx(train(want), rel=ROUNDING)
    after = logits(want, "llama")
    model.save_pretrained(tmp_path / "adapter")
    assert distance(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "adapter"), "llama"), after) < ROUNDING
    model.load_adapter(tmp_path / "adapter", "second")
    model.set_adapter("second")
    assert distance(logits(model, "llama"), after) < ROUNDING
    # what is trained is a copy
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))
    merged, want_merged = model.merge_and_unload(), want.merge_and_unload()
    assert distance(logits(merged, "llama"), logits(want_merged, "llama")) < ROUNDING


@pytest.mark.parametrize("tokens", [[5, 7], {"embed_tokens": [5]}])
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_training_offloaded_tensors_in_place_is_refused(way, tokens, offloaded):
    for changes in ({"trainable_token_indices": tokens}, {"bias": "all"}, {"bias": "dlor_only"}):
        model = offloaded(way)
        with pytest.raises(ValueError, match=r"dlor_peft\.offload: .* offloaded\. Leave"):
            adapt(model, **changes)
        assert not layers(model)


def test_biases_on_a_device_are_trained_beside_offloaded_layers(offloaded):
    model = adapt(offloaded("dispatch_model"), bias="dlor_only", target_modules=r".*layers\.0\..*(q_proj|k_proj)")
    want = adapt(build("llama"), bias="dlor_only", target_modules=r".*layers\.0\..*(q_proj|k_proj)")
    assert train(model) == pytest.approx(train(want), rel=ROUNDING)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_tied_layers_merge_alike(way, offloaded):
    changes = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    model = adapt(offloaded(way, tie_word_embeddings=True), "scaled-output", **changes)
    want = adapt(build("llama", tie_word_embeddings=True), "scaled-output", **changes)
    unmerged = logits(want, "llama")
    assert distance(logits(model, "llama"), unmerged) < ROUNDING
    for one in (model, want):
        one.merge_adapter()
    assert torch.equal(logits(model, "llama"), logits(want, "llama"))
    model.unmerge_adapter()
    assert distance(logits(model, "llama"), unmerged) < ROUNDING


def test_a_model_on_the_meta_device_takes_a_meta_adapter():
    with torch.device("meta"):
        model = build("llama")
    model = get_peft_model(model, config_of("llama"))
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_adapters_of_a_mixed_model_are_where_the_layer_runs(way, offloaded):
    models = [build("llama"), offloaded(way)]
    for index, base in enumerate(models):
        torch.manual_seed(0)
        models[index] = PeftMixedModel(base, config_of("llama", "additive"), "first").eval()
    assert torch.equal(logits(models[1], "llama"), logits(models[0], "llama"))


def test_layers_around_those_of_lora_merge():
    """PEFT brings the innermost weight of nested layers in, and writes back only one that is not nested."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        model = PeftMixedModel(build("llama"), lora, "first")
        model.add_adapter("second", config_of("llama", "scaled-both"))
        model.set_adapter(["first", "second"])
        models.append(model.eval())
    want, model = models
    cpu_offload(model, execution_device="cpu")
    for one in models:
        one.merge_adapter()
    assert torch.equal(logits(model, "llama"), logits(want, "llama"))


class Experts(nn.Module):
    """Two parameters that one call reads; PEFT nests the wrappers of their adapters."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return torch.einsum("ti,eoi->to", x, self.up) @ self.down.T


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.experts = Experts()

    def forward(self, ids):
        x = self.table(ids)
        return self.experts(F.gelu(self.conv(x.T).T))


@pytest.mark.parametrize("form", ["scaled-output", "multiplicative"])
@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_embeddings_convolutions_and_parameters(offload, form, tmp_path):
    models = []
    ids = torch.arange(9)
    for is_offloaded_one in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        if is_offloaded_one:
            model = (
                cpu_offload(model, execution_device="cpu")
                if offload == "cpu"
                else disk_offload(model, tmp_path, execution_device="cpu")
            )
        form_config = {"mode": "scaled", "side": "output"} if form == "scaled-output" else {"mode": "multiplicative"}
        torch.manual_seed(1)
        config = DLoRConfig(
            r=2,
            init_weights=False,
            target_modules=["table", "conv"],
            target_parameters=["experts.up", "experts.down"],
            **form_config,
        )
        models.append(get_peft_model(model, config).eval())
    want, model = models
    assert torch.equal(model(ids), want(ids))
    for one in models:
        one(ids).square().sum().backward()
    for name, parameter in adapter_parameters(want).items():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad)
    unmerged = want(ids)
    state = get_peft_model_state_dict(model)
    assert all(torch.equal(state[key], value) for key, value in get_peft_model_state_dict(want).items())
    for one in models:
        one.merge_adapter()
    assert torch.equal(model(ids), want(ids))
    model.unmerge_adapter()
    assert torch.equal(model(ids), unmerged)
    want.unmerge_adapter()
    assert torch.equal(model.merge_and_unload()(ids), want.merge_and_unload()(ids))
