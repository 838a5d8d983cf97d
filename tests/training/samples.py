import json
from pathlib import Path

from dlor_peft.cli import main

TOKENIZER = Path(__file__).parents[2] / "recipes" / "models" / "stories260K"
TOPICS = {"card": "my card is lost", "cash": "the cash did not come out", "pin": "change pin", "rate": "which rate"}

WITHOUT_GPU = {
    "bf16": False,
    "activation_checkpointing": False,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
"""What TRL's training arguments default to is for a GPU."""


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def error_of(capsys, *arguments):
    """What a refused `dlor train` says."""
    assert main(["train", *map(str, arguments)]) == 2
    return capsys.readouterr().err
