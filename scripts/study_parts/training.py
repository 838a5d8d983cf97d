"""One run: a method on a task, at a budget, a learning rate and a seed."""

from __future__ import annotations

import time
from typing import Any

import torch
from benchmark.measuring import saved_bytes
from peft import get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from dlor_peft import parameter_groups
from dlor_peft.maths import alignment_index

from .methods import METHODS, PROBE, UNMATCHED, allocate, num_parameters, rank_counts
from .results import Run
from .sentences import Sentences
from .sources import Sources
from .task import Task
from .tasks import tasks

SELECTION_SEEDS = (0, 101, 102)
"""The learning rate is chosen with them, on dev; the seeds that are reported are others, on test."""

WARMUP = 0.1

POINTS = 8
"""How often a reported run measures on its way, where its task knows what the base was trained on."""


def run_one(run: Run, sources: Sources) -> dict[str, Any]:
    """The row of a run, without its key; `diverged` in the place of metrics where the loss is no number."""
    torch.set_num_threads(1)
    task = tasks(sources)[run.task]
    if run.method == PROBE:
        assert isinstance(task, Sentences)
        return {"test": task.probe(run.seed)}
    model, facts = adapted(task, run)
    weights = _weights(task, model) if run.method == "full" else {}
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer, schedule = optimizer_of(task, run, model)
    model.train()
    split = "dev" if run.seed in SELECTION_SEEDS else "test"
    losses, seconds, path, saved = [], [], [], 0
    for step, rows in enumerate(task.batches(run.seed)):
        if step == 1:
            saved = saved_bytes(model, lambda rows=rows: task.loss(model, rows))
        start = time.perf_counter()
        loss = task.loss(model, rows)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if not torch.isfinite(loss):
            return {**facts, "diverged": step}
        if split == "test" and step % (task.steps // POINTS) == 0 and (base := task.forgotten(model)) is not None:
            path.append([step + 1, task.evaluate(model, split)[task.headline], base])
    model.eval()
    return {
        **facts,
        split: task.evaluate(model, split),
        "train_loss": sum(losses[-20:]) / len(losses[-20:]),
        "base_loss": task.forgotten(model),
        "seconds_per_step": sorted(seconds)[len(seconds) // 2],
        "saved_bytes": saved,
        **({"path": path} if path else {}),
        **({"alignment": _alignment(weights, _weights(task, model))} if weights else {}),
    }


def _weights(task: Task, model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights of the layers that the adapters of other methods are on."""
    return {name: model.get_parameter(f"{name}.weight").detach().clone().cpu() for name in task.targets(model)}


def _alignment(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float]:
    """What a diagonal explains of what full fine-tuning changed, of its rows and of its columns: mean over layers."""
    changes = {name: (after[name] - W, W) for name, W in before.items()}
    rows = [alignment_index(delta, W).item() for delta, W in changes.values()]
    columns = [alignment_index(delta.mT, W.mT).item() for delta, W in changes.values()]
    return {"rows": sum(rows) / len(rows), "columns": sum(columns) / len(columns)}


def adapted(task: Task, run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The model with what is to be trained, and its size. The head is drawn before the adapter."""
    base = task.build(run.seed)
    if run.method in UNMATCHED:
        for name, parameter in base.named_parameters():
            is_head = task.head is not None and name.startswith(f"{task.head}.")
            parameter.requires_grad_(is_head or run.method == "full")
        model: nn.Module = base
        trained = sum(p.numel() for name, p in base.named_parameters() if p.requires_grad)
        return model, {"parameters": trained, "budget": None, "adapter_bytes": 4 * trained, "setting": task.setting}
    method, layers = METHODS[run.method], task.targets(base)
    ranks = allocate(method, layers, run.k)
    if ranks is None:
        raise ValueError(f"study: {run.method} can't have the parameters of LoRA r {run.k} on these layers.")
    config = method.config(ranks, layers)
    # PEFT saves and trains the head of a classifier by itself
    config.task_type = None
    torch.manual_seed(run.seed)
    model = get_peft_model(base, config)
    if method.start != 1:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if ".dlor_V." in name:
                    p.mul_(method.start)
    adapter = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in adapter)
    if count != num_parameters(method, layers, ranks):
        raise RuntimeError(f"{run.method}: {count} parameters, not {num_parameters(method, layers, ranks)}")
    if task.head is not None:
        base.get_submodule(task.head).requires_grad_(True)
    budget = run.k * sum(I + O for I, O in layers.values())
    facts = {"parameters": count, "budget": budget, "adapter_bytes": sum(p.nbytes for p in adapter)}
    return model, {**facts, "setting": task.setting, "ranks": rank_counts(ranks)}


def optimizer_of(task: Task, run: Run, model: Any) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW without decay, linear warm-up and decay to 0; the head has a rate of its own."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if _is_head(task, name)]
    groups = [{"params": [p for name, p in trained.items() if not _is_head(task, name)], "lr": run.lr}]
    method = METHODS.get(run.method)
    if method and method.lora_plus is not None:
        # PEFT would sort the head among the factors
        for p in head:
            p.requires_grad_(False)
        made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=run.lr, loraplus_lr_ratio=method.lora_plus)
        groups = [{"params": group["params"], "lr": group["lr"]} for group in made.param_groups]
        for p in head:
            p.requires_grad_(True)
    elif method and method.ratios:
        by_role = parameter_groups(model, run.lr, **method.ratios)
        groups = [group for group in by_role if not group["role"].startswith("full")]
    groups.append({"params": head, "lr": run.lr if run.method == "head" else task.head_lr})
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    return optimizer, get_linear_schedule_with_warmup(optimizer, int(WARMUP * task.steps), task.steps)


def _is_head(task: Task, name: str) -> bool:
    return task.head is not None and f"{task.head}." in name
