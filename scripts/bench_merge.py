"""Peak memory and time of `dlor merge`, of PEFT's merge in memory and of a plain copy, over the size of the model.

    python scripts/bench_merge.py                          # 0.1 to 4 GB, in some minutes; bench_merge.json and .png
    python scripts/bench_merge.py --sizes 0.1 0.5 --rounds 1

A model is made on the spot: a Llama of hidden size 2048 in bfloat16, with as many layers as the size takes, random
weights, and adapters of rank 16 on all its linear layers. Each path runs in a process of its own, one after the other
in each round; times are compared within a round. Time is from the first byte read to the last byte on disk, without
the imports; peak memory is the highest resident size of the process less that after the imports, files that are mapped
included. Then, on a model in memory, an adapter is replaced by another one from the disk: by hot-swapping, and by
loading, switching to, and deleting.

Goals: the memory of `dlor merge` does not grow with the model; it takes at most twice as long as the copy; swapping
takes at most half of the time of PEFT's loading. The exit status is 1 where one of them is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmark import report

PATHS = ("copy", "dlor merge", "in memory")
SWAPS = ("DLoR hot-swap", "LoRA hot-swap", "DLoR load, set, delete", "LoRA load, set, delete")
SIZES = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
LAYER_BYTES = 2 * (4 * 2048**2 + 3 * 2048 * 5632)
RANK = 16


def llama(size: float) -> Any:
    from transformers import LlamaConfig

    layers = max(1, round(size * 1e9 / LAYER_BYTES))
    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=8192, dtype="bfloat16",
    )  # fmt: skip


def make(folder: Path, size: float) -> None:
    """The model and, on it, an adapter of each method that is not the identity."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM
    from transformers.initialization import no_init_weights

    import dlor_peft

    torch.manual_seed(0)
    noise = torch.randn(2**22).mul_(0.02).bfloat16()
    with no_init_weights():
        model = LlamaForCausalLM(llama(size)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            repeats = -(-parameter.numel() // noise.numel())
            parameter.copy_(noise.repeat(repeats)[: parameter.numel()].view_as(parameter))
    model.save_pretrained(folder / "base", max_shard_size="1GB")
    for name, config in (
        ("dlor", dlor_peft.DLoRConfig(r=RANK, target_modules="all-linear", init_weights=False)),
        ("lora", LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)),
    ):
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()


def copy(folder: Path, out: Path) -> None:
    out.mkdir()
    for path in (folder / "base").iterdir():
        shutil.copyfile(path, out / path.name)
        with (out / path.name).open("rb") as file:
            os.fsync(file.fileno())


def merge_on_disk(folder: Path, out: Path) -> None:
    from dlor_peft.deploy.adapter import read_adapter
    from dlor_peft.deploy.checkpoint import Checkpoint
    from dlor_peft.deploy.merge import Merge, MergeOptions

    Merge(Checkpoint(folder / "base"), [read_adapter(folder / "dlor")], MergeOptions(shard_size="1GB")).write(out)


def merge_in_memory(folder: Path, out: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "dlor")
    model.merge_and_unload().save_pretrained(out, max_shard_size="1GB")
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def peak() -> int:
    # in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(path: str, folder: Path, out: Path) -> dict[str, float]:
    """In a process of its own."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import dlor_peft

    run: Callable[[Path, Path], None] = dict(zip(PATHS, (copy, merge_on_disk, merge_in_memory), strict=True))[path]
    # whatever is imported at the first use, without the memory
    import_module("dlor_peft.deploy.merge")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(0))
    get_peft_model(model, dlor_peft.DLoRConfig(target_modules="all-linear"), low_cpu_mem_usage=True)
    before, started = peak(), time.perf_counter()
    run(folder, out)
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak() - before}


def measure_swaps(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way to replace an adapter of a model in memory, in rounds."""
    import torch
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter
    from transformers import AutoModelForCausalLM

    import dlor_peft

    dlor_peft.register()
    models = {}
    for name in ("dlor", "lora"):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        models[name] = PeftModel.from_pretrained(base, folder / name)
    seconds: dict[str, list[float]] = {name: [] for name in SWAPS}
    for at in range(rounds + 1):
        for label in SWAPS:
            name = label.split()[0].lower()
            model = models[name]
            (current,) = model.peft_config
            started = time.perf_counter()
            if "hot-swap" in label:
                hotswap_adapter(model, str(folder / name), current, torch_device="cpu")
            else:
                other = f"round{at}"
                model.load_adapter(folder / name, other, torch_device="cpu")
                model.set_adapter(other)
                model.delete_adapter(current)
            # the first warms up
            if at:
                seconds[label].append(time.perf_counter() - started)
    with torch.no_grad():
        for model in models.values():
            assert model(input_ids=torch.arange(4)[None]).logits.isfinite().all()
    return seconds


def child(*arguments: str) -> Any:
    command = [sys.executable, "-W", "ignore", __file__, *arguments]
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench_merge.py: {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measured(sizes: list[float], rounds: int, folder: Path) -> list[dict[str, Any]]:
    results = []
    for size in sizes:
        models = folder / f"{size}"
        child("--make", str(models), str(size))
        runs: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
        for _ in range(rounds):
            for path in PATHS:
                out = models / "out"
                runs[path].append(child("--measure", path, str(models), str(out)))
                shutil.rmtree(out)
        num_bytes = sum(path.stat().st_size for path in (models / "base").glob("*.safetensors"))
        swaps = child("--swaps", str(models), str(rounds + 2)) if size == sizes[0] else None
        shutil.rmtree(models)
        results.append({"bytes": num_bytes, "runs": runs, "swaps": swaps})
        print(f"{num_bytes / 1e9:.2f} GB measured", file=sys.stderr, flush=True)
    return results


def median_ratio(runs: dict[str, list[dict[str, float]]], path: str, over: str) -> float:
    pairs = zip(runs[path], runs[over], strict=True)
    return statistics.median(mine["seconds"] / theirs["seconds"] for mine, theirs in pairs)


def peak_of(runs: dict[str, list[dict[str, float]]], path: str) -> float:
    return max(run["peak_bytes"] for run in runs[path])


def show(results: list[dict[str, Any]]) -> bool:
    """Print the tables; whether all goals are met."""
    rows = []
    for result in results:
        runs = result["runs"]
        seconds = statistics.median(run["seconds"] for run in runs["copy"])
        rows.append(
            [f"{result['bytes'] / 1e9:.2f}", f"{seconds:.2f}"]
            + [f"{median_ratio(runs, path, 'copy'):.2f}" for path in PATHS[1:]]
            + [f"{peak_of(runs, path) / 1e6:.0f}" for path in PATHS]
        )
    header = ["GB", "copy, s", "dlor merge / copy", "in memory / copy", *(f"{path}, peak MB" for path in PATHS)]
    print(report.table(header, rows))
    peaks = [peak_of(result["runs"], "dlor merge") for result in results]
    slowest = max(median_ratio(result["runs"], "dlor merge", "copy") for result in results)
    growth = (peaks[-1] - peaks[0]) / max(1, results[-1]["bytes"] - results[0]["bytes"])
    swaps = results[0]["swaps"]
    medians = {name: statistics.median(swaps[name]) for name in SWAPS}
    print("\n" + report.table(["adapter replaced", "ms"], [[name, f"{1000 * medians[name]:.1f}"] for name in SWAPS]))
    swap = medians["DLoR hot-swap"] / medians["LoRA load, set, delete"]
    goals = [
        ("peak memory of dlor merge, by the size of the model", growth, 0.05),
        ("largest peak of dlor merge, GiB", max(peaks) / 2**30, 1.0),
        ("time of dlor merge over that of the copy", slowest, 2.0),
        ("DLoR's hot-swap over LoRA's loading, setting and deleting", swap, 0.5),
    ]
    found = [[name, f"<= {limit}", f"{value:.3f}", "yes" if value <= limit else "NO"] for name, value, limit in goals]
    print("\n" + report.table(["goal", "limit", "measured", "met"], found))
    return all(value <= limit for _, value, limit in goals)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    memory, seconds = figure.subplots(1, 2)
    gigabytes = [result["bytes"] / 1e9 for result in results]
    for name in PATHS:
        runs = [result["runs"] for result in results]
        memory.plot(gigabytes, [peak_of(run, name) / 1e9 for run in runs], marker="o", label=name)
        times = [statistics.median(one["seconds"] for one in run[name]) for run in runs]
        seconds.plot(gigabytes, times, marker="o", label=name)
    for axes, label in ((memory, "peak memory, GB"), (seconds, "seconds")):
        axes.set(xlabel="size of the model, GB", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    memory.legend()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES), metavar="GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where models are made (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of the results (default: .)")
    # one run, in this process
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--swaps", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(Path(arguments.make[0]), float(arguments.make[1]))
        print("{}")
        return 0
    if arguments.measure:
        path, folder, out = arguments.measure
        print(json.dumps(measure(path, Path(folder), Path(out))))
        return 0
    if arguments.swaps:
        print(json.dumps(measure_swaps(Path(arguments.swaps[0]), int(arguments.swaps[1]))))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measured(sorted(arguments.sizes), arguments.rounds, Path(folder))
    arguments.out.mkdir(parents=True, exist_ok=True)
    everything = {"environment": report.environment("cpu"), "results": results}
    (arguments.out / "bench_merge.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    plot(results, arguments.out / "bench_merge.png")
    return int(not show(results))


if __name__ == "__main__":
    sys.exit(main())
