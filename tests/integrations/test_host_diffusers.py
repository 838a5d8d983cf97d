"""Models of diffusers with DLoRConfig, through their own adapter methods and through PEFT."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict

from dlor_peft import DLoRConfig

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

TARGETS = {"unet": ["to_q", "to_v", "to_out.0", "conv1"], "flux": ["to_q", "to_v", "proj_mlp"]}
# PEFT remarks on every adapter after the first
second_adapter = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
every_kind = pytest.mark.parametrize("kind", TARGETS)


def build(kind):
    torch.manual_seed(0)
    if kind == "unet":
        model = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        )  # fmt: skip
    else:
        model = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
    return model.eval()


def sample(model, kind, **options):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 3, 8, generator=generator)
    if kind == "unet":
        return model(torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3, 5]), text, **options).sample
    return model(
        hidden_states=torch.randn(2, 16, 4, generator=generator), encoder_hidden_states=text,
        pooled_projections=torch.randn(2, 8, generator=generator), timestep=torch.tensor([0.5, 0.3]),
        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(3, 3), **options,
    ).sample  # fmt: skip


def output(model, kind, **options):
    with torch.no_grad():
        return sample(model, kind, **options)


def config(kind, **changes):
    return DLoRConfig(**{"r": 2, "target_modules": list(TARGETS[kind]), "init_weights": False, **changes})


def with_adapter(kind, **changes):
    model = build(kind)
    torch.manual_seed(2)
    model.add_adapter(config(kind, **changes))
    return model.eval()


@every_kind
def test_add_disable_and_enable(kind):
    base = output(build(kind), kind)
    assert torch.equal(output(with_adapter(kind, init_weights=True), kind), base)
    model = with_adapter(kind)
    want = output(model, kind)
    assert not torch.allclose(want, base)
    model.disable_adapters()
    assert torch.equal(output(model, kind), base)
    model.enable_adapters()
    assert torch.equal(output(model, kind), want)


@second_adapter
@every_kind
def test_set_adapters_with_weights_and_delete(kind):
    base, model = output(build(kind), kind), with_adapter(kind)
    want = output(model, kind)
    model.add_adapter(config(kind, mode="additive"), "second")
    model.eval()
    model.set_adapters(["default", "second"], [0.5, 0.25])
    assert model.active_adapters() == ["default", "second"]
    both = output(model, kind)
    assert not torch.allclose(both, want)
    model.set_adapters(["default", "second"], [1.0, 0.0])
    assert torch.allclose(output(model, kind), want, atol=1e-6)
    model.set_adapters(["default", "second"], [0.0, 0.0])
    assert torch.allclose(output(model, kind), base, atol=1e-6)
    model.set_adapters("default")
    model.delete_adapters("second")
    assert not any(".second." in name for name in model.state_dict())
    assert torch.equal(output(model, kind), want)


@pytest.mark.parametrize(("kind", "keyword"), [("unet", "cross_attention_kwargs"), ("flux", "joint_attention_kwargs")])
def test_the_scale_of_a_call(kind, keyword):
    base, model = output(build(kind), kind), with_adapter(kind)
    want = output(model, kind)
    assert torch.allclose(output(model, kind, **{keyword: {"scale": 0.0}}), base, atol=1e-6)
    assert torch.equal(output(model, kind), want)


@every_kind
def test_fuse_and_unfuse(kind):
    model = with_adapter(kind)
    want = output(model, kind)
    model.fuse_lora()
    assert torch.allclose(output(model, kind), want, atol=1e-5)
    model.unfuse_lora()
    assert torch.equal(output(model, kind), want)


@every_kind
def test_trains_and_is_saved_through_peft(kind, tmp_path):
    model = get_peft_model(build(kind), config(kind, init_weights=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        sample(model, kind).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    want = output(model.eval(), kind)
    assert not torch.allclose(want, output(build(kind), kind))
    model.save_pretrained(tmp_path)
    # the model of a pipeline is adapted in place
    plain = build(kind)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(output(plain, kind), want)
    merged = loaded.merge_and_unload()
    assert type(merged) is type(build(kind))
    assert torch.allclose(output(merged, kind), want, atol=1e-5)


@every_kind
def test_an_adapter_of_add_adapter_moves_by_its_state_dict(kind):
    model, other = with_adapter(kind), build(kind)
    inject_adapter_in_model(config(kind, init_weights=True), other)
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert torch.equal(output(other.eval(), kind), output(model, kind))


@every_kind
def test_lora_files_do_not_take_it(kind, tmp_path):
    with_adapter(kind).save_lora_adapter(tmp_path)
    with pytest.raises((TypeError, IndexError)):
        build(kind).load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
