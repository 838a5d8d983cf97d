import json
from pathlib import Path

TOKENIZER = Path(__file__).parents[2] / "recipes" / "models" / "stories260K"
TOPICS = {"card": "my card is lost", "cash": "the cash did not come out", "pin": "change pin", "rate": "which rate"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
