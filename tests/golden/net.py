"""The network of the golden adapters, one layer of each kind that DLoR adapts, and how the adapters were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dlor_peft import DLoRConfig, __version__

HERE = Path(__file__).parent
IDS = torch.arange(10).reshape(2, 5)
LAYERS = ["embed", "conv", "attention", "up", "down"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "scaled": {"target_modules": LAYERS, "target_parameters": ["experts.weight"]},
    "scaled-both": {"target_modules": ["up", "down"], "side": "both", "diagonal": "scalar"},
    "additive": {"target_modules": LAYERS, "mode": "additive"},
    "multiplicative": {"target_modules": LAYERS, "mode": "multiplicative", "side": "output", "depth": 2},
    "diagonal": {"target_modules": ["up", "down"], "r": 0, "side": "input"},
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.weight)


class Net(nn.Module):
    """ids (B, T) -> (B, T, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up = nn.Linear(6, 9)
        self.down = Conv1D(6, 9)
        self.experts = Experts()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        x = x + self.attention(x, x, x)[0]
        return self.experts(x + self.down(self.up(x).tanh()))


def base(folder: Path) -> Net:
    net = Net()
    net.load_state_dict(load_file(folder / "base.safetensors"))
    return net.eval()


def adapted(net: Net, name: str) -> PeftModel:
    return get_peft_model(net, DLoRConfig(**{"r": 2, "init_weights": False, **ADAPTERS[name]})).eval()


@torch.no_grad()
def write() -> None:
    """One folder for the version at hand, with a base, its adapters, and what they give."""
    folder = HERE / __version__
    folder.mkdir()
    torch.manual_seed(0)
    net = Net()
    for parameter in net.parameters():
        parameter.normal_(std=0.4)
    save_file(net.state_dict(), folder / "base.safetensors")
    outputs = {"base": base(folder)(IDS)}
    for name in ADAPTERS:
        model = adapted(base(folder), name)
        outputs[name] = model(IDS)
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    write()
