"""lr_group = lr * ratio of its role: parameter groups for diagonals, U, V and what is trained besides them."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FlatParameter
from torch.utils.hooks import RemovableHandle

from .cap import capped_tensors, check_limits, project
from .layers import owned_adapters

U_LR_RATIO = 4.0
"""Tried against 1 and no other: README, "At equal parameters"."""

ROLES = ("diagonal", "U", "V", "other", "other_no_decay", "full", "full_no_decay")


def create_dlor_optimizer(
    model: nn.Module,
    lr: float,
    diag_lr_ratio: float = 1.0,
    u_lr_ratio: float | None = None,
    weight_decay: float = 0.0,
    *,
    head_lr: float | None = None,
    max_ratio: float | None = None,
    max_spread: float | None = None,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """An optimizer over `parameter_groups`, which has the meaning of rates and decay.

    It is a plain one: accelerate, Trainer(optimizers=...), schedulers and checkpoints take it as any other.

    Args:
        model: any model with PEFT adapters, DLoR's or others.
        lr: of V and of all that has no rate of its own.
        diag_lr_ratio: that of the diagonals over lr.
        u_lr_ratio: that of U over lr, as in LoRA+ (arXiv 2402.12354); None is 4 where there is a U. The best lr is
            then a third to all of what it is with 1.
        weight_decay: towards no change; see `parameter_groups`.
        head_lr: of what is trained in full.
        max_ratio: keep ||U V^T||_2 <= max_ratio * min|1 + delta| by a projection after each step; see
            `dlor_peft.limit_ratio`, which says for which forms, and what that guarantees.
        max_spread: keep max|1 + delta| <= max_spread * min|1 + delta| as well.
        optimizer_class: any subclass of torch.optim.Optimizer that takes parameter groups.
        **kwargs: passed on to it.

    Raises:
        ValueError: a rate, decay or limit is given that would have no effect on this model, or cannot be kept.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        raise TypeError(
            f"dlor_peft.optimiser: optimizer_class must be a subclass of torch.optim.Optimizer, but it is "
            f"{optimizer_class!r}. Pass the class itself, such as torch.optim.AdamW, and its arguments by keyword."
        )
    groups = parameter_groups(model, lr, diag_lr_ratio, u_lr_ratio, weight_decay, head_lr=head_lr)
    optimizer = cast(Any, optimizer_class)(groups, lr=lr, **kwargs)
    if weight_decay and "weight_decay" not in optimizer.defaults:
        raise ValueError(
            f"dlor_peft.optimiser: weight_decay={weight_decay} is given, but {optimizer_class.__name__} has no weight "
            "decay. Leave it out, or take another optimizer_class."
        )
    if max_ratio is not None:
        limit_ratio_after_steps(optimizer, model, max_ratio, max_spread)
    elif max_spread is not None:
        raise ValueError(
            f"dlor_peft.optimiser: max_spread={max_spread} bounds a condition number together with max_ratio only. "
            "Give both, for example max_ratio=0.5."
        )
    return optimizer


def limit_ratio_after_steps(
    optimizer: torch.optim.Optimizer, model: nn.Module, max_ratio: float, max_spread: float | None = None
) -> RemovableHandle:
    """`dlor_peft.limit_ratio` on the adapters that are trained now, after each step of the optimizer.

    A post-hook of the optimizer itself, so that it runs inside of accelerate's wrapper too, and not for a step that a
    gradient scaler skips. `remove()` of what is returned ends it.
    """
    check_limits(max_ratio, max_spread)
    capped = capped_tensors(model)
    return optimizer.register_step_post_hook(lambda *_: project(capped, max_ratio, max_spread))


def parameter_groups(
    model: nn.Module,
    lr: float,
    diag_lr_ratio: float = 1.0,
    u_lr_ratio: float | None = None,
    weight_decay: float = 0.0,
    *,
    head_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, each group with "params", "lr", "weight_decay" and "role".

    | role | what | lr | decays |
    |---|---|---|---|
    | "diagonal" | delta | lr * diag_lr_ratio | yes |
    | "U" | U | lr * u_lr_ratio (None: 4) | yes |
    | "V" | V | lr | no |
    | "other" | tensors of other PEFT methods | lr | yes |
    | "full" | modules_to_save, trained tokens and biases, all else of the model | head_lr, or lr | yes |

    Groups that would be empty are left out. Biases and norms of the last two are in "other_no_decay" and
    "full_no_decay", as transformers' Trainer has it. Tied tensors are in the group of the layer that owns them.

    The identity is delta = 0 and U = 0 whatever V is, so decay on delta and U pulls towards no change. It leaves V
    alone: V only says which directions U reads. Where U is 0, decay on V would take from its size, and so from the
    gradient of U, and bring nothing nearer to the identity; where U is not, U's own decay shrinks U V^T already. The
    low-rank term of an embedding starts with V = 0 and U random: there U has the role "V", and V the role "U".

    Raises:
        ValueError: nothing is trained, or a diag_lr_ratio other than 1, a u_lr_ratio or a head_lr is given and nothing
            has that role.
    """
    for name, ratio in (
        ("lr", lr),
        ("diag_lr_ratio", diag_lr_ratio),
        ("u_lr_ratio", u_lr_ratio),
        ("head_lr", head_lr),
    ):
        if ratio is not None and not 0 < ratio < float("inf"):
            raise ValueError(
                f"dlor_peft.optimiser: {name} must be above 0 and finite, but it is {ratio!r}. To train a part not at "
                'all, leave it out of the adapter: diagonal="none" or r=0.'
            )
    members: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
    for parameter, role in _roles(model).items():
        members[role].append(parameter)
    if not any(members.values()):
        raise ValueError(
            "dlor_peft.optimiser: the model has no trainable parameter. Make the adapter with inference_mode=False, "
            "load it with is_trainable=True, or activate it with set_adapter."
        )
    for name, value, default, roles, what in (
        ("diag_lr_ratio", diag_lr_ratio, 1, ("diagonal",), "a trainable diagonal of DLoR"),
        ("u_lr_ratio", u_lr_ratio, None, ("U",), "a trainable factor U of DLoR"),
        ("head_lr", head_lr, None, ("full", "full_no_decay"), "a parameter that is trained in full (modules_to_save)"),
    ):
        if value != default and not any(members[role] for role in roles):
            raise ValueError(
                f"dlor_peft.optimiser: {name}={value!r} is given, but the model does not have {what}. Leave {name} "
                "out."
            )
    rates = {"diagonal": lr * diag_lr_ratio, "U": lr * (U_LR_RATIO if u_lr_ratio is None else u_lr_ratio)}
    if head_lr is not None:
        rates |= {"full": head_lr, "full_no_decay": head_lr}
    return [
        {
            "params": params,
            "lr": rates.get(role, lr),
            "weight_decay": 0.0 if role == "V" or role.endswith("no_decay") else weight_decay,
            "role": role,
        }
        for role, params in members.items()
        if params
    ]


def _roles(model: nn.Module) -> dict[nn.Parameter, str]:
    """The role of each trainable parameter, in the order of the model."""
    # importing the trainer takes seconds
    from transformers import Trainer

    own = _dlor_roles(model)
    in_full = {
        parameter
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for parameter in module.parameters()
    }
    marks = _marks(model)
    # it makes no use of the trainer
    decaying = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    roles = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, FlatParameter):
            raise ValueError(
                f"dlor_peft.optimiser: FSDP has flattened the parameters into one ({name!r}), in which diagonals, U "
                "and V cannot be told apart. Wrap the model with use_orig_params=True, or use FSDP2."
            )
        if parameter in own:
            roles[parameter] = own[parameter]
            continue
        is_other = parameter not in in_full and any(part.startswith(marks) for part in name.split("."))
        roles[parameter] = ("other" if is_other else "full") + ("" if name in decaying else "_no_decay")
    return roles


def _dlor_roles(model: nn.Module) -> dict[nn.Parameter, str]:
    roles = {}
    for _, layer, adapter_name in owned_adapters(model):
        deviation, directions = layer.factor_names(adapter_name)
        names = {"dlor_diag": "diagonal", "dlor_diag_in": "diagonal", deviation: "U", directions: "V"}
        for name in layer.form[adapter_name].shapes:
            roles[getattr(layer, name)[adapter_name].weight] = names[name]
    return roles


def _marks(model: nn.Module) -> tuple[str, ...]:
    """How the names of the tensors of other PEFT methods start."""
    marks = {"prompt_encoder"}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            marks.update(module.adapter_layer_names)
        elif isinstance(module, BaseTuner) and getattr(module, "prefix", None):
            marks.add(module.prefix)
    return tuple(marks)
