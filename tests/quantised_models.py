"""Small models quantised by each library that PEFT has a backend for, loaded on the CPU as their users load them."""

import gc
import json
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import VOCABULARY, dense, layers
from torch import nn
from transformers import (
    AqlmConfig,
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

from dlor_peft import DLoRConfig

GROUP = 32
TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
FORMS = {
    "additive": {"mode": "additive"},
    "scaled-input": {"mode": "scaled", "side": "input"},
    "scaled-output": {"mode": "scaled", "side": "output"},
    "scaled-both": {"mode": "scaled", "side": "both"},
    "multiplicative-input": {"mode": "multiplicative", "side": "input", "depth": 2},
    "multiplicative-output": {"mode": "multiplicative", "side": "output", "depth": 2},
}


def save_llama(folder, biases):
    """An unquantised checkpoint whose weights divide into groups of 32 and 64."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, attention_bias=biases, mlp_bias=biases, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def bitsandbytes(folder, dtype, **config):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=BitsAndBytesConfig(**config))


def torchao(folder, dtype, make_config, skip=("lm_head",)):
    config = TorchAoConfig(quant_type=make_config(), modules_to_not_convert=list(skip))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int8_dynamic():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def int4():
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def int4_packed():
    # torchao's int4 kernel for the CPU, which has no derivative and whose layout cannot be read back
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=GROUP)


def int8_by_name():
    from torchao.quantization import FqnToConfig

    return FqnToConfig({r"re:.*layers\.1\..*_proj": int8()})


def hqq(folder, dtype, bits):
    # transformers 5.23 loads nothing with an HqqConfig: hqq quantises a loaded model
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = BaseQuantizeConfig(nbits=bits, group_size=GROUP, axis=1)
    # it collects garbage after every layer
    gc.freeze()
    try:
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=dtype, device="cpu")
    finally:
        gc.unfreeze()
    return model


def inc(folder, dtype):
    """float8 with the scales of one calibration; on a CPU it rounds weights and activations, and computes in dtype."""
    from neural_compressor.torch.quantization import FP8Config, convert, finalize_calibration, prepare

    config = FP8Config(
        fp8_config="E4M3",
        use_qdq=True,
        scale_method="maxabs_pow2",
        scale_format="const",
        blocklist={"names": ["lm_head"]},
        dump_stats_path=str(folder / "inc"),
    )
    model = prepare(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), config)
    with torch.no_grad():
        model(torch.arange(VOCABULARY)[None])
    finalize_calibration(model)
    return convert(model)


def aqlm(folder, dtype):
    """Random codes; the first decoder layer is left as it is."""
    # not 8 bits, for which aqlm needs numba
    bits, group, codebooks = 9, 4, 2
    torch.manual_seed(4)

    def quantise(W):
        O, I = W.shape
        return {
            "codebooks": torch.randn(codebooks, 2**bits, 1, group) * (2 * I) ** -0.5,
            "codes": torch.randint(2**bits, (O, I // group, codebooks)).to(torch.int16),
            "scales": torch.ones(O, 1, 1, 1),
        }

    config = AqlmConfig(
        in_group_size=group,
        out_group_size=1,
        num_codebooks=codebooks,
        nbits_per_codebook=bits,
        linear_weights_not_to_quantize=["lm_head", "model.layers.0"],
    )
    return prequantised(folder, dtype, "aqlm", config, quantise, first=1)


def int4_groups(W):
    """Round to nearest: codes 0 to 15 as (I, O) and scales (I / 32, O), W^T = scale (code - 8)."""
    O, I = W.shape
    groups = W.T.reshape(I // GROUP, GROUP, O)
    scales = groups.abs().amax(1) / 7
    return (groups / scales[:, None]).round().clamp(-8, 7).reshape(I, O).long() + 8, scales


def pack(codes, order=range(8)):
    """Eight 4-bit codes of a column, in this order from the lowest bits on, to one int32."""
    eights = codes.reshape(-1, 8, codes.shape[1])[:, list(order)]
    return (eights << torch.arange(0, 32, 4)[None, :, None]).sum(1).to(torch.int32)


def gptq(folder, dtype):
    def quantise(W):
        codes, scales = int4_groups(W)
        return {
            "qweight": pack(codes),
            "qzeros": pack(torch.full_like(scales.T, 7, dtype=torch.long)).T.contiguous(),  # stored less one
            "scales": scales.half(),
            "g_idx": (torch.arange(len(codes)) // GROUP).to(torch.int32),
        }

    # the kernel of gptqmodel's that trains
    config = GPTQConfig(bits=4, group_size=GROUP, sym=True, desc_act=False, backend="gptq_torch")
    return prequantised(folder, dtype, "gptq", config, quantise)


def awq(folder, dtype):
    def quantise(W):
        codes, scales = int4_groups(W)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": pack(codes.T, order).T.contiguous(),
            "qzeros": pack(torch.full_like(scales.T, 8, dtype=torch.long), order).T.contiguous(),
            "scales": scales.half(),
        }

    config = AwqConfig(bits=4, group_size=GROUP, zero_point=True, backend="torch_awq")
    return prequantised(folder, dtype, "awq", config, quantise)


def prequantised(folder, dtype, name, config, quantise, first=0):
    """Load a checkpoint whose decoder layers from `first` on hold the tensors that `quantise` makes of a weight."""
    target = folder / name
    if not target.exists():
        target.mkdir()
        tensors = {}
        for key, value in load_file(folder / "model.safetensors").items():
            if key.endswith("_proj.weight") and int(key.split(".")[2]) >= first:
                tensors |= {key.removesuffix("weight") + part: tensor for part, tensor in quantise(value).items()}
            else:
                tensors[key] = value
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        description = json.loads((folder / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**description, "quantization_config": config.to_dict()}))
    return AutoModelForCausalLM.from_pretrained(target, dtype=dtype)


@dataclass(frozen=True)
class Backend:
    """One way to quantise; calling it loads the model of the fixture `checkpoints`, or skips the test."""

    packages: tuple
    load: object
    name: str  # PEFT's
    merges: bool = True
    # whether a layer passes a gradient on to its input
    trains: bool = True
    rounds_activations: bool = False
    biases: bool = True

    def __call__(self, checkpoints, dtype=torch.float32):
        return self.from_folder(checkpoints[self.biases], dtype)

    def from_folder(self, folder, dtype=torch.float32):
        for package in self.packages:
            pytest.importorskip(package, reason=f"{package} is not installed")
        return self.load(folder, dtype)


BNB, TORCHAO, HQQ, GPTQMODEL = ("bitsandbytes",), ("torchao",), ("hqq",), ("gptqmodel", "optimum")
FIRST_IN_FLOATS = ("lm_head", "model.layers.0")

BACKENDS = {
    "bnb-8bit": Backend(BNB, partial(bitsandbytes, load_in_8bit=True), "bnb 8bit"),
    "bnb-4bit": Backend(BNB, partial(bitsandbytes, load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bnb 4bit"),
    "bnb-4bit-double": Backend(
        BNB, partial(bitsandbytes, load_in_4bit=True, bnb_4bit_use_double_quant=True), "bnb 4bit"
    ),
    "torchao-int8": Backend(TORCHAO, partial(torchao, make_config=int8), "torchao"),
    "torchao-int8-dynamic": Backend(
        TORCHAO, partial(torchao, make_config=int8_dynamic), "torchao", trains=False, rounds_activations=True
    ),
    "torchao-int4": Backend(TORCHAO, partial(torchao, make_config=int4), "torchao"),
    "torchao-int4-packed": Backend(
        TORCHAO, partial(torchao, make_config=int4_packed, skip=FIRST_IN_FLOATS), "torchao", merges=False, trains=False
    ),
    # it would quantise the biases with the weights
    "torchao-int8-by-name": Backend(
        TORCHAO, partial(torchao, make_config=int8_by_name), "torchao", merges=False, biases=False
    ),
    "hqq-8bit": Backend(HQQ, partial(hqq, bits=8), "hqq"),
    "hqq-4bit": Backend(HQQ, partial(hqq, bits=4), "hqq"),
    "inc": Backend(("neural_compressor",), inc, "inc", merges=False, trains=False, rounds_activations=True),
    "aqlm": Backend(("aqlm",), aqlm, "aqlm", merges=False),
    "gptq": Backend(GPTQMODEL, gptq, "gptq", merges=False),
    # gptqmodel's layers for AWQ are of its class for GPTQ too, which PEFT looks for first
    "awq": Backend(GPTQMODEL, awq, "gptq", merges=False),
}


def case(name, backend):
    # gptqmodel leaves a temporary folder to the garbage collector
    unclean = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
    return pytest.param(backend, id=name, marks=[unclean] if backend.packages == GPTQMODEL else [])


ALL = [case(name, backend) for name, backend in BACKENDS.items()]
MERGING = [case for case in ALL if case.values[0].merges]
REFUSING = [case for case in ALL if not case.values[0].merges]
TRAINING = [case for case in ALL if case.values[0].trains]


def config_of(form="scaled-both", **changes):
    return DLoRConfig(r=4, target_modules=TARGETS, **FORMS[form], **changes)


def adapted(base, form="scaled-both"):
    """A PeftModel in training mode whose adapter is not the identity.

    In that mode bitsandbytes computes with the dequantised weight; in inference it rounds the activations, too.
    """
    torch.manual_seed(2)
    model = get_peft_model(base, config_of(form, init_weights=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    return model.train()


def tokens():
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(tokens()).logits.float()


def loss(model):
    return model(input_ids=tokens(), labels=tokens()).loss


def quantised(model):
    return {name: layer for name, layer in layers(model).items() if layer.quantization_backend is not None}


def weights(model):
    return {name: layer.get_base_weight().detach().double() for name, layer in quantised(model).items()}


def dense_weights(model, form):
    """W' of every quantised layer in float64, from the dequantised W."""
    W, mode, side = weights(model), FORMS[form]["mode"], FORMS[form].get("side", "")
    return {name: dense(layer, "default", W[name], mode, side) for name, layer in quantised(model).items()}


def contents(value, path="", found=None, seen=None):
    """Path -> value of all tensors and plain values that hang on a layer, its parameters and what they hold."""
    found, seen = ({}, set()) if found is None else (found, seen)
    if id(value) in seen:
        return found
    seen.add(id(value))
    parts = {}
    if isinstance(value, bool | int | float | str | torch.dtype):
        found[path] = value
    elif isinstance(value, dict):
        parts = value
    elif isinstance(value, torch.Tensor | nn.Module) or type(value).__module__.startswith("bitsandbytes"):
        parts = value.__dict__
        # torchao's tensors are what their parts are
        if isinstance(value, torch.Tensor) and not hasattr(value, "tensor_data_names"):
            found[path] = value.detach().clone()
    for name, part in parts.items():
        if name not in ("training", "is_training", "module") and not name.endswith("_hooks"):
            contents(part, f"{path}.{name}", found, seen)
    return found


def differences(got, want):
    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return a == b

    return [path for path in got.keys() | want.keys() if path not in got or not same(got[path], want.get(path))]
