"""The contract of run.py in PEFT's method_comparison/MetaMathQA, on a tiny model and a few rows on the CPU."""

import argparse
import json
import os
import sys

import torch
from data import rows
from peft import PeftConfig, get_peft_model
from utils import RESULTS, base_model, branch, experiment_of, train_config

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("path_experiment")
    parser.add_argument("--clean", action="store_true")
    arguments = parser.parse_args()
    name = experiment_of(arguments.path_experiment)
    config = PeftConfig.from_pretrained(arguments.path_experiment)
    params = train_config(os.path.join(arguments.path_experiment, "training_params.json"))
    torch.manual_seed(params.seed)
    model = get_peft_model(base_model(), config, autocast_adapter_dtype=params.autocast_adapter_dtype)
    optimizer = getattr(torch.optim, params.optimizer_type)(model.parameters(), **params.optimizer_kwargs)
    status, error, losses = "success", "", []
    # as the harness does: what goes wrong from here on ends up in a row, and the exit status is 0
    try:
        for step in range(params.max_steps):
            batch = rows(params, step)
            optimizer.zero_grad()
            loss = model(**batch, num_items_in_batch=batch["attention_mask"].sum()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), params.grad_norm_clip)
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        ids = batch["input_ids"]
        answer = model.generate(input_ids=ids[:, :8], max_new_tokens=4, do_sample=False)
        accuracy = (answer[:, 8:12] == ids[:, 8:12]).float().mean().item()
        metrics = [{"step": params.max_steps, "test accuracy": accuracy}]
    except Exception as exception:
        status, error, metrics = "canceled", str(exception), []
    trainable, total = model.get_nb_trainable_parameters()
    config = config.to_dict()
    row = {
        "run_info": {
            "experiment_name": name,
            "peft_branch": branch(),
            "train_config": vars(params),
            "peft_config": {key: list(value) if isinstance(value, set) else value for key, value in config.items()},
            "error_msg": error,
        },
        "train_info": {
            "num_trainable_params": trainable,
            "num_total_params": total,
            "status": status,
            "losses": losses,
            "metrics": metrics,
        },
    }
    folder = RESULTS[0] if branch() == "main" else RESULTS[1]
    file = os.path.join(RESULTS[2] if status == "canceled" else folder, f"{name.replace(os.path.sep, '--')}.json")
    with open(file, "w") as stream:
        json.dump(row, stream)
    if arguments.verbose:
        print(f"Saved log to: {file}", file=sys.stderr)
