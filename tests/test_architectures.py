"""Every architecture in PEFT's tables trains a step, saves, loads and merges; the README has the count."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from architectures import ABSENT, BUILT, batch, build
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from tiny_models import FORMS, adapter_parameters, base_parameters, distance
from torch import Tensor, nn

from dlor_peft import DLoRConfig, DLoRLayer

# transformers 5.17 compiles functions of deberta and gpt_bigcode with it
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SWEPT = ["scaled", "scaled-output", "scaled-both", "additive", "multiplicative-input-3", "multiplicative-output-3"]

# what "all-linear" finds and neither DLoR nor LoRA can adapt: the router of llama4 is a torch.nn.Linear that returns a
# tuple, and Mamba's kernels read the weight of out_proj without calling it
NOT_LINEAR = {"llama4": ["router"], "nemotron_h": ["out_proj"]}

# float32 rounding, relative to the largest logit; the step changes the logits by more than a hundred times as much
MERGED = 1e-4

# where LoRA, and so DLoR, has no default targets, both cases of an architecture take all linear layers
CASES = [
    pytest.param(model_type, chosen, form, id=f"{model_type}-{chosen}-{form}")
    for k, model_type in enumerate(BUILT)
    for targets, form in (("default", SWEPT[k % len(SWEPT)]), ("all-linear", SWEPT[(k + 2) % len(SWEPT)]))
    for chosen in [targets if model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING else "all-linear"]
]
SKIPPED = [
    pytest.param(model_type, "default", "scaled", id=model_type, marks=pytest.mark.skip(reason=reason))
    for model_type in ABSENT
    for reason in [f"transformers {version('transformers')} has no model type {model_type!r}"]
]


def config_of(model_type: str, targets: str, form: str) -> DLoRConfig:
    if targets == "default":
        return DLoRConfig(**{"r": 3, **FORMS[form]})
    return DLoRConfig(
        **{"r": 3, **FORMS[form]}, target_modules="all-linear", exclude_modules=NOT_LINEAR.get(model_type)
    )


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def changed(parameters: dict[str, Tensor], before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}


def with_gradient(model_type: str, inputs: dict[str, Tensor]) -> set[str]:
    """The parameters of the bare model that its loss depends on."""
    model = build(model_type).train()
    model(**inputs).loss.backward()
    return {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }


def adapted_weight(model: nn.Module, name: str) -> str:
    """What a parameter of the bare model is called that a parameter of the adapter adapts."""
    path = name.partition(".dlor_")[0]
    parameter_name = model.get_submodule(path).parameter_name
    return f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{parameter_name}"


def train_one_step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    model.train()
    loss = model(**inputs).loss
    assert loss.isfinite()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("model_type", "targets", "form"), [*CASES, *SKIPPED])
def test_it_trains_saves_loads_and_merges(model_type, targets, form, tmp_path):
    base = build(model_type)
    inputs = batch(base)
    untrained = logits(base, inputs)
    torch.manual_seed(2)
    model = get_peft_model(base, config_of(model_type, targets, form))
    assert torch.equal(logits(model, inputs), untrained)

    adapter, frozen = copies(adapter_parameters(model)), copies(base_parameters(model))
    train_one_step(model, inputs)
    assert not changed(base_parameters(model), frozen)
    # V has no gradient while U is zero
    moved = {name for name in changed(adapter_parameters(model), adapter) if ".dlor_V." not in name}
    reached = with_gradient(model_type, inputs)
    weights = {name: adapted_weight(model, name) for name in adapter if ".dlor_V." not in name}
    assert moved == {name for name, weight in weights.items() if weight in reached}

    trained = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(model_type), tmp_path)
    assert torch.equal(logits(loaded, inputs), trained)
    merged = loaded.merge_and_unload()
    assert not any(isinstance(module, DLoRLayer) for module in merged.modules())
    assert distance(logits(merged, inputs), trained) < MERGED
    assert distance(untrained, trained) > 100 * MERGED


@pytest.mark.parametrize("config_class", [DLoRConfig, LoraConfig])
@pytest.mark.parametrize("model_type", NOT_LINEAR)
def test_what_is_excluded_from_all_linear_is_beyond_lora_too(model_type, config_class):
    base = build(model_type)
    inputs = batch(base)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        get_peft_model(base, config_class(target_modules="all-linear"))(**inputs)


# switched to evaluation, RwkvModel scales its stream, and the weights that write to it, down by powers of 2: a factor
# of the weight is scaled along, a term beside it is not
HALVED = pytest.mark.xfail(strict=True, reason="RWKV's rescaling misses adapters, unless the config turns it off")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LoraConfig(init_lora_weights=False), id="lora", marks=HALVED),
        pytest.param(DLoRConfig(init_weights=False), id="scaled", marks=HALVED),
        pytest.param(DLoRConfig(init_weights=False, mode="additive"), id="additive", marks=HALVED),
        pytest.param(DLoRConfig(init_weights=False, mode="multiplicative"), id="multiplicative"),
    ],
)
def test_rwkv_evaluates_what_it_trained(config: PeftConfig):
    base = build("rwkv", rescale_every=1)
    inputs = batch(base)
    torch.manual_seed(2)
    model = get_peft_model(base, config).train()
    with torch.no_grad():
        trained = model(**inputs).logits
    # the bare model is 1e-4 apart itself: the epsilon of its normalisation is not divided
    assert distance(logits(model, inputs), trained) < 1e-3


def pinned(package: str) -> str:
    constraints = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8")
    return re.search(rf"^{package}==(\S+)$", constraints, flags=re.MULTILINE)[1]


def test_the_readme_has_the_count():
    for package in ("transformers", "peft"):
        if version(package) != pinned(package):
            pytest.skip(f"the count is that of {package} {pinned(package)}, not of the installed {version(package)}")
    failing = sorted({case.values[0] for case in CASES if any(mark.name == "xfail" for mark in case.marks)})
    excluded = [f"{model_type} (`{', '.join(modules)}`)" for model_type, modules in NOT_LINEAR.items()]
    row = re.search(r"^\| architectures \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    for fact in (
        f"{len(BUILT) - len(failing)} of the {len(BUILT)} in PEFT's tables of default targets that transformers "
        f"{pinned('transformers').rpartition('.')[0]} has",
        f"failures: {', '.join(failing) or 'none'}",
        f'"all-linear" needs `exclude_modules` for {" and ".join(excluded)}',
        f"not in transformers: {', '.join(ABSENT)}",
    ):
        assert fact in row[1]
