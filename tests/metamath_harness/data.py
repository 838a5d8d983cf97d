"""Rows of MetaMathQA's shape."""

from typing import Any

import torch

ROWS = [
    {
        "type": "GSM_Rephrased",
        "query": f"Anna has {n} apples and buys {n} more. How many does she have?",
        "original_question": f"Anna has {n} apples and buys {n} more. How many does she have?",
        "response": f"She has {n} + {n} = {2 * n} apples.\n#### {2 * n}\nThe answer is: {2 * n}",
    }
    for n in range(2, 10)
]


def rows(params: Any, step: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right, with labels on every token but the padding."""
    chosen = [ROWS[(step * params.batch_size + i) % len(ROWS)] for i in range(params.batch_size)]
    texts = [params.query_template.format(query=row["query"]) + row["response"] for row in chosen]
    ids = [torch.tensor(list(text.encode()))[: params.max_seq_length] for text in texts]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = (input_ids != 0).long()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}
