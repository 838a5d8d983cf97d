"""Trainable parameters of every experiment on Llama-3.2-3B, beside those of PEFT's LoRA with the same targets.

    python scripts/method_comparison/parameters.py    # a table; nothing is downloaded, no weight is allocated

Counted on the meta device, so that the layers are those that PEFT makes. The adapter file holds them in float32, as
the harness trains them: 4 bytes each.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from peft import LoraConfig, PeftConfig, get_peft_model

import dlor_peft  # noqa: F401  registers DLOR

EXPERIMENTS = Path(__file__).parent / "experiments" / "dlor"
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    bos_token_id=128000,
    eos_token_id=128001,
)
# as in PEFT's own rows: target_modules null is q_proj and v_proj for Llama
LORA = {
    f"lora/llama-3.2-3B-{name}": LoraConfig(r=r, lora_alpha=2 * r, use_dora=dora, task_type="CAUSAL_LM")
    for name, r, dora in (("rank32", 32, False), ("rank32-dora", 32, True), ("rank64", 64, False))
}


def count(config: PeftConfig) -> int:
    """Parameters that get a gradient when the harness wraps Llama-3.2-3B with `config`."""
    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(LLAMA), config, low_cpu_mem_usage=True)
    return model.get_nb_trainable_parameters()[0]


def counts() -> dict[str, int]:
    """Experiment, as the harness names it -> trainable parameters; fewest first."""
    ours = {f"dlor/{path.name}": PeftConfig.from_pretrained(str(path)) for path in EXPERIMENTS.iterdir()}
    return dict(sorted(((name, count(config)) for name, config in (ours | LORA).items()), key=lambda item: item[1]))


def main() -> None:
    print("| experiment | trainable parameters | adapter file |\n|---|---|---|")
    for name, number in counts().items():
        print(f"| `{name}` | {number:,} | {4 * number / 1e6:.1f} MB |")


if __name__ == "__main__":
    main()
