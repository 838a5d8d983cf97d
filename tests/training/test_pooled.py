import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from dlor_peft.training.pooled import MeanPooledClassifier


def batch(*rows):
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_it_round_trips_through_its_own_config(encoder, tmp_path):
    model = MeanPooledClassifier.on_encoder(AutoModel.from_pretrained(encoder), {0: "card", 1: "cash", 2: "pin"})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, MeanPooledClassifier)
    assert loaded.config.id2label == {0: "card", 1: "cash", 2: "pin"}
    inputs = batch([5, 6, 7])
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


def test_padding_does_not_change_an_embedding(encoder):
    model = MeanPooledClassifier.on_encoder(AutoModel.from_pretrained(encoder), {0: "card", 1: "cash"})
    with torch.no_grad():
        alone = model.embed(**batch([5, 6, 7]))
        padded = model.embed(**batch([5, 6, 7], [8] * 9))[:1]
    torch.testing.assert_close(alone, padded, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(1))


def test_logits_are_scaled_and_the_loss_is_cross_entropy(encoder):
    model = MeanPooledClassifier.on_encoder(AutoModel.from_pretrained(encoder), {0: "card", 1: "cash"})
    inputs = batch([5, 6, 7], [8, 9])
    output = model(**inputs, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(output.logits, 20 * model.classifier(model.embed(**inputs)))
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([0, 1])))
