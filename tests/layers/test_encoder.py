"""Adapters inside torch.nn.TransformerEncoder, which has paths that read weights and make nested tensors."""

import warnings
from typing import Any

import pytest
import torch
from formula import assert_close, configure
from peft import get_peft_model
from torch import nn

WIDTH, HEADS = 6, 2
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])


def encoder(layers_: int = 2, **arguments: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    options = {"batch_first": True, "dropout": 0.0, **arguments}
    with warnings.catch_warnings():
        # torch tells which options keep it from its fast path
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 10, **options), layers_).eval()


TARGETS = [["self_attn"], ["linear1"], ["linear2"], ["out_proj"], ["self_attn", "linear1", "linear2"], "all-linear"]
ENCODERS: list[dict[str, Any]] = [{}, {"norm_first": True}, {"bias": False}, {"activation": "gelu"}]


@pytest.mark.parametrize("arguments", ENCODERS, ids=str)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_adapters_inside_the_encoder_take_effect_without_gradients(targets, arguments):
    """The fast path of nn.TransformerEncoderLayer reads weights and calls no layer."""
    x = torch.randn(3, 5, WIDTH)
    base = encoder(**arguments)(x)
    for form in ("scaled-both", "additive", "multiplicative-output-3"):
        torch.manual_seed(1)
        model = get_peft_model(encoder(**arguments), configure(form, target_modules=targets))
        want = model.train()(x)
        model.eval()
        assert (want - base).abs().max() > 1e-3
        assert_close(model(x), want, 1e-5)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_close(model(x), want, 1e-5)
                with model.disable_adapter():
                    assert_close(model(x), base, 1e-5)
        with torch.no_grad():
            model.merge_adapter()
            assert_close(model(x), want, 1e-5)
            model.unmerge_adapter()
            assert_close(model.merge_and_unload()(x), want, 1e-5)


@pytest.mark.parametrize("form", ["additive", "scaled-both", "multiplicative-output-3"])
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_padding_inside_the_encoder(targets, form):
    """nn.TransformerEncoder makes a nested tensor of a padded batch, in eval mode without gradients."""
    x = torch.randn(3, 5, WIDTH)
    model = get_peft_model(encoder(), configure(form, target_modules=targets))
    want = model.train()(x, src_key_padding_mask=PADDING)
    model.eval()
    with torch.no_grad():
        got = model(x, src_key_padding_mask=PADDING)
        kept = ~PADDING[:, : got.shape[1]]
        assert_close(got[kept], want[:, : got.shape[1]][kept], 1e-5)
        merged = model.merge_and_unload()(x, src_key_padding_mask=PADDING)
        assert_close(merged[kept], want[:, : got.shape[1]][kept], 1e-5)


def test_an_encoder_layer_alone_and_a_decoder_layer():
    x, memory = torch.randn(2, 3, 5, WIDTH)
    targets = ["self_attn", "linear1"]
    torch.manual_seed(0)
    alone = nn.TransformerEncoderLayer(WIDTH, HEADS, 10, batch_first=True, dropout=0.0)
    decoder = nn.TransformerDecoderLayer(WIDTH, HEADS, 10, batch_first=True, dropout=0.0)
    for net, args, more in ((alone, (x,), []), (decoder, (x, memory), ["multihead_attn"])):
        base = net.eval()(*args)
        model = get_peft_model(net, configure("multiplicative-input-3", target_modules=targets + more))
        want = model.train()(*args)
        assert (want - base).abs().max() > 1e-3
        with torch.no_grad():
            assert_close(model.eval()(*args), want, 1e-5)
        want.sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        assert_close(model.merge_and_unload()(*args), want, 1e-5)
