"""What the tests of hot-swapping share."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.utils import hotswap
from tiny_models import build, config_of


def make(form="scaled", seed=5, **changes):
    model = build("llama")
    torch.manual_seed(seed)
    return get_peft_model(model, config_of("llama", form, **changes)).eval()


def saved(model, path, **kwargs):
    model.save_pretrained(path, **kwargs)
    return path


def swap(model, path, adapter_name="default"):
    hotswap.hotswap_adapter(model, path, adapter_name, torch_device="cpu")


def assert_refused_without_a_trace(error, match, model, path, adapter_name="default"):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.peft_config)
    with pytest.raises(error, match=match):
        swap(model, path, adapter_name)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.peft_config == config
