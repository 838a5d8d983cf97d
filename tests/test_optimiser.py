"""Parameter groups by role: every trainable parameter once, rates and decay as documented, through any trainer."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftMixedModel, PromptEncoderConfig, get_peft_model
from tiny_models import FORMS, adapted, build, config_of, inputs
from torch import nn
from transformers import Trainer, TrainingArguments

import dlor_peft
from dlor_peft import DLoRConfig, create_dlor_optimizer, parameter_groups
from dlor_peft.optimiser import ROLES

EXTRAS = {
    "plain": {},
    "heads": {"modules_to_save": ["lm_head"], "trainable_token_indices": [1, 3], "bias": "dlor_only"},
    "norms": {"modules_to_save": ["norm", "input_layernorm"], "bias": "all"},
}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def by_role(groups: list[dict]) -> dict[str, dict]:
    roles = [group["role"] for group in groups]
    assert len(set(roles)) == len(roles)
    assert set(roles) <= set(ROLES)
    return dict(zip(roles, groups, strict=True))


def assert_complete(model: nn.Module, groups: list[dict]) -> None:
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert all(group["params"] for group in groups)
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable(model))


def names(model: nn.Module, group: dict) -> list[str]:
    members = set(group["params"])
    return [name for name, parameter in model.named_parameters() if parameter in members]


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("form", FORMS)
def test_every_trainable_parameter_is_in_one_group(form, extra):
    model = get_peft_model(build("llama"), config_of("llama", form, **EXTRAS[extra]))
    groups = parameter_groups(model, 1e-3, weight_decay=0.1)
    assert_complete(model, groups)
    roles = by_role(groups)
    for role, parts in (("diagonal", ("dlor_diag", "dlor_diag_in")), ("U", ("dlor_U",)), ("V", ("dlor_V",))):
        for name in names(model, roles[role]) if role in roles else ():
            assert any(f".{part}." in name for part in parts), name
    assert not any("dlor_" in name for role in roles if "full" in role for name in names(model, roles[role]))
    assert not {"other", "other_no_decay"} & set(roles)


def test_the_rates_and_decays_of_the_roles():
    model = get_peft_model(build("llama"), config_of("llama", **EXTRAS["heads"]))
    optimizer = create_dlor_optimizer(model, 1e-3, 4.0, 16.0, 0.1, head_lr=0.5)
    found = {group["role"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {
        "diagonal": (4e-3, 0.1),
        "U": (1.6e-2, 0.1),
        "V": (1e-3, 0.0),
        "full": (0.5, 0.1),
        "full_no_decay": (0.5, 0.0),
    }
    assert type(optimizer) is torch.optim.AdamW
    no_decay = names(model, by_role(optimizer.param_groups)["full_no_decay"])
    assert no_decay
    assert all(name.endswith("bias") for name in no_decay)


def test_norms_that_are_trained_do_not_decay():
    model = get_peft_model(build("llama"), config_of("llama", **EXTRAS["norms"]))
    roles = by_role(parameter_groups(model, 1e-3, weight_decay=0.1))
    assert "full" not in roles
    assert any("layernorm" in name for name in names(model, roles["full_no_decay"]))


def test_decay_pulls_towards_no_change_and_leaves_v_alone():
    """With gradients of 0, only decay acts: delta and U shrink by 1 - lr * ratio * decay, V stays."""
    model = adapted("llama")
    layer = next(module for module in model.modules() if isinstance(module, dlor_peft.DLoRLayer))
    before = {
        part: getattr(layer, part)["default"].weight.detach().clone() for part in ("dlor_diag", "dlor_U", "dlor_V")
    }
    optimizer = create_dlor_optimizer(model, 0.1, 2.0, 3.0, 0.5, optimizer_class=torch.optim.AdamW)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for part, factor in (("dlor_diag", 1 - 0.1), ("dlor_U", 1 - 0.15), ("dlor_V", 1.0)):
        torch.testing.assert_close(getattr(layer, part)["default"].weight.detach(), factor * before[part])


def test_the_factor_of_an_embedding_that_starts_at_zero_has_the_role_u():
    config = config_of("llama", target_modules=["embed_tokens", "q_proj"], init_weights=True)
    model = get_peft_model(build("llama"), config)
    roles = by_role(parameter_groups(model, 1e-3))
    assert any("embed_tokens.dlor_V" in name for name in names(model, roles["U"]))
    assert any("embed_tokens.dlor_U" in name for name in names(model, roles["V"]))
    assert not any(parameter.any() for parameter in roles["U"]["params"])
    assert all(parameter.any() for parameter in roles["V"]["params"])


def test_tied_tensors_are_in_one_group_once():
    base = build("llama", tie_word_embeddings=True)
    config = config_of("llama", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(base, config)
    groups = parameter_groups(model, 1e-3)
    assert_complete(model, groups)
    assert sum("embed_tokens.dlor_V" in name for name in names(model, by_role(groups)["U"])) == 1


def test_adapters_that_are_not_active_are_not_trained():
    model = adapted("llama")
    model.add_adapter("second", config_of("llama", "multiplicative"))
    assert_complete(model, parameter_groups(model, 1e-3))
    assert not any("second" in name for group in parameter_groups(model, 1e-3) for name in names(model, group))
    model.base_model.set_adapter(["default", "second"])
    groups = parameter_groups(model, 1e-3)
    assert_complete(model, groups)
    assert any("second" in name for name in names(model, by_role(groups)["U"]))


def test_other_methods_beside_dlor():
    model = PeftMixedModel(build("llama"), config_of("llama"))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.set_adapter(["default", "lora"])
    roles = by_role(parameter_groups(model, 1e-3, u_lr_ratio=2.0))
    assert_complete(model, list(roles.values()))
    assert all("lora_" in name for name in names(model, roles["other"]))
    assert set(roles) == {"diagonal", "U", "V", "other"}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=4),
    ],
    ids=["lora", "prompts"],
)
def test_a_model_without_dlor(config):
    model = get_peft_model(build("llama"), config)
    roles = by_role(parameter_groups(model, 1e-3, weight_decay=0.1))
    assert_complete(model, list(roles.values()))
    assert all("lora_" in name or "prompt" in name for name in names(model, roles["other"]))
    with pytest.raises(ValueError, match="u_lr_ratio=2 is given, but the model does not have a trainable factor U"):
        create_dlor_optimizer(model, 1e-3, u_lr_ratio=2)
    with pytest.raises(ValueError, match="diag_lr_ratio=2 is given, but the model does not have a trainable diagonal"):
        create_dlor_optimizer(model, 1e-3, diag_lr_ratio=2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"head_lr": 0.1}, ValueError, r"head_lr=0.1 is given, but .*modules_to_save.*Leave head_lr out"),
        ({"diag_lr_ratio": 0}, ValueError, r"diag_lr_ratio must be above 0 and finite, but it is 0"),
        ({"u_lr_ratio": float("nan")}, ValueError, r"u_lr_ratio must be above 0 and finite"),
        ({"optimizer_class": "AdamW"}, TypeError, r"must be a subclass of torch.optim.Optimizer, but it is 'AdamW'"),
        ({"optimizer_class": nn.Linear}, TypeError, r"must be a subclass of torch.optim.Optimizer"),
        ({"optimizer_class": torch.optim.Rprop, "weight_decay": 0.1}, ValueError, r"Rprop has no weight decay"),
        ({"max_spread": 2.0}, ValueError, r"max_spread=2.0 bounds a condition number together with max_ratio"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        create_dlor_optimizer(adapted("llama"), 1e-3, **arguments)
    assert str(caught.value).startswith("dlor_peft.optimiser: ")


def test_a_model_that_is_not_trained_is_refused():
    model = get_peft_model(build("llama"), config_of("llama", inference_mode=True))
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model, 1e-3)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "Adafactor", "ASGD", "Rprop"])
def test_any_optimizer_class_of_torch_trains(kind):
    model, batch = adapted("llama"), inputs("llama")
    optimizer = create_dlor_optimizer(
        model, 1e-3, 2.0, 4.0, optimizer_class=getattr(torch.optim, kind), head_lr=None, **({"foreach": False})
    )
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(**batch, labels=batch["input_ids"]).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def run(folder, steps: int, resume: bool = False) -> tuple[list[float], torch.optim.Optimizer]:
    model = get_peft_model(build("llama"), config_of("llama", modules_to_save=["lm_head"], init_weights=True))
    ids = inputs("llama", rows=8)["input_ids"].tolist()
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, seed=0, lr_scheduler_type="constant", dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = create_dlor_optimizer(model, 1e-2, 2.0, 4.0, 0.1, head_lr=1e-3)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == steps
    return losses, optimizer


def test_roles_and_rates_survive_the_trainer_and_its_checkpoints(tmp_path):
    whole, optimizer = run(tmp_path, 4)
    resumed, again = run(tmp_path, 4, resume=True)
    assert whole == resumed
    for one, other in zip(optimizer.param_groups, again.param_groups, strict=True):
        assert {key: one[key] for key in one if key != "params"} == {k: v for k, v in other.items() if k != "params"}
        for p, q in zip(one["params"], other["params"], strict=True):
            assert torch.equal(p, q)
    assert [group["lr"] for group in again.param_groups] == [2e-2, 4e-2, 1e-2, 1e-3]


def test_accelerate_keeps_the_groups():
    model = adapted("llama")
    optimizer = create_dlor_optimizer(model, 1e-2, u_lr_ratio=4.0)
    before = [(group["role"], group["lr"], group["params"]) for group in optimizer.param_groups]
    _, prepared = Accelerator(cpu=True).prepare(model, optimizer)
    assert [(group["role"], group["lr"], group["params"]) for group in prepared.param_groups] == before


def test_u_and_v_learn_at_their_rates():
    """One step of plain SGD moves each tensor by its rate times its gradient."""
    model, batch = adapted("llama"), inputs("llama")
    optimizer = create_dlor_optimizer(model, 1e-2, 3.0, 5.0, optimizer_class=torch.optim.SGD)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    before = {parameter: parameter.detach().clone() for parameter in trainable(model)}
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, (3e-2, 5e-2, 1e-2), strict=True):
        for parameter in group["params"]:
            torch.testing.assert_close(parameter.detach(), before[parameter] - rate * parameter.grad)


def test_u_learns_four_times_as_fast_unless_it_is_told_otherwise():
    model = adapted("llama")
    assert [group["lr"] for group in parameter_groups(model, 1e-2)] == [1e-2, 4e-2, 1e-2]
    assert [group["lr"] for group in parameter_groups(model, 1e-2, u_lr_ratio=1)] == [1e-2, 1e-2, 1e-2]
    model = get_peft_model(build("llama"), DLoRConfig(r=0, target_modules=["q_proj"]))
    assert [group["role"] for group in parameter_groups(model, 1e-2)] == ["diagonal"]
    with pytest.raises(ValueError, match="u_lr_ratio=1 is given, but the model does not have a trainable factor U"):
        parameter_groups(model, 1e-2, u_lr_ratio=1)


def test_a_config_without_diagonal_has_no_such_group():
    model = get_peft_model(build("llama"), DLoRConfig(diagonal="none", target_modules=["q_proj"]))
    assert [group["role"] for group in parameter_groups(model, 1e-3)] == ["U", "V"]
