import math

import pytest
import torch
from samples import TOKENIZER
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlor_peft.training.states import StateMismatchError, compare_state
from dlor_peft.training.tasks.generation import Generation, compare_generations, generate

TOKENIZED = AutoTokenizer.from_pretrained(TOKENIZER)


def generation(tokens, *leads):
    return Generation(tokens, list(leads), 10.0)


def test_a_generation_tells_by_how_much_each_token_leads():
    model = AutoModelForCausalLM.from_pretrained(TOKENIZER, dtype=torch.float32).eval()
    prompt = TOKENIZED("Once upon a time")["input_ids"]
    (made,) = generate(model, [prompt], 5, TOKENIZED)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + made.tokens])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    assert made.tokens == logits.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor(made.leads), best[:, 0] - best[:, 1], rtol=1e-3, atol=1e-3)
    assert made.largest == pytest.approx(logits.abs().max().item(), rel=1e-4)


def test_generations_differ_by_the_lead_where_they_part():
    trained = [generation([5, 6, 7], 3.0, 0.2, 9.0), generation([5, 6], 1.0, 1.0), generation([5, 6], 1.0, 1.0)]
    other = [generation([5, 8, 9], 3.0, 0.1, 1.0), generation([5, 6], 1.0, 1.0), generation([5, 7], 1.0, 1.0)]
    found = compare_generations(trained, other, TOKENIZED)
    assert (found.num_outputs, found.num_different, found.largest_lead) == (3, 2, 1.0)
    assert found.first_difference.startswith("prompt 2 was continued with")
    assert compare_generations(trained, trained, TOKENIZED).largest_lead is None
    shorter = compare_generations([generation([5, 6], 1.0, 1.0)], [generation([5], 1.0)], TOKENIZED)
    assert shorter.largest_lead == math.inf


@pytest.mark.parametrize(("dtype", "lead", "passes"), [
    (torch.float32, 1e-3, True), (torch.float32, 1e-2, False),
    (torch.bfloat16, 0.5, True), (torch.bfloat16, 1.0, False),
])  # fmt: skip
def test_rounding_explains_a_small_lead_and_no_other(dtype, lead, passes, capsys):
    found = compare_generations([generation([5], lead)], [generation([6], lead)], TOKENIZED)
    if passes:
        assert compare_state(found, dtype, "merged", "adapter")["num_different"] == 1
        assert "merged: 1 of 1 outputs differ by a choice that rounding turns" in capsys.readouterr().out
    else:
        with pytest.raises(StateMismatchError, match="the merged adapter"):
            compare_state(found, dtype, "merged", "adapter")
