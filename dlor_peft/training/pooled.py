"""A sentence encoder with a linear head: logits = scale * classifier(normalise(mean of the last hidden states))."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledConfig(PretrainedConfig):
    """The encoder's own config, nested as a plain mapping, and the head's scale."""

    model_type = "mean_pooled_classifier"

    def __init__(self, encoder: dict[str, Any] | None = None, scale: float = 20.0, **kwargs: Any) -> None:
        self.encoder = encoder or {"model_type": "bert"}
        self.scale = scale
        super().__init__(**{"problem_type": "single_label_classification", **kwargs})


class MeanPooledClassifier(PreTrainedModel):
    """Embeddings have norm 1, so the fixed scale sets how sharp the softmax can get, as in cosine classifiers."""

    config_class = MeanPooledConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: MeanPooledConfig) -> None:
        super().__init__(config)
        assert config.num_labels is not None
        self.encoder = _without_pooler(AutoModel.from_config(AutoConfig.for_model(**config.encoder)))
        self.classifier = nn.Linear(self.encoder.config.hidden_size, config.num_labels)
        self.post_init()

    @classmethod
    def on_encoder(cls, encoder: PreTrainedModel, id2label: dict[int, str]) -> MeanPooledClassifier:
        """A newly drawn head on a pretrained encoder, whose pooler is dropped."""
        label2id = {label: index for index, label in id2label.items()}
        model = cls(MeanPooledConfig(encoder=encoder.config.to_dict(), id2label=id2label, label2id=label2id))
        model.encoder = _without_pooler(encoder)
        # where PEFT looks for the base model's name
        model.name_or_path = model.config.name_or_path = encoder.config.name_or_path
        return model.to(encoder.dtype).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]

    def embed(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Unit vectors, (B, hidden)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        # normalising makes the mean's division by the number of tokens needless
        return F.normalize((hidden * mask).sum(1), dim=-1)

    @torch.no_grad()
    def set_head(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """logits = embed(x) weight^T + bias from now on: weight (labels, hidden), bias (labels,)."""
        self.classifier.weight.copy_(weight / self.config.scale)
        self.classifier.bias.copy_(bias / self.config.scale)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """`kwargs` (token_type_ids, inputs_embeds, ...) go to the encoder."""
        if attention_mask is None:
            raise ValueError("MeanPooledClassifier needs attention_mask: without it padding would enter the mean.")
        logits = self.config.scale * self.classifier(self.embed(input_ids, attention_mask, **kwargs))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _without_pooler(encoder: PreTrainedModel) -> PreTrainedModel:
    # BERT's pooler reads the first token: unused here, it would only attract adapters that never see a gradient
    if hasattr(encoder, "pooler"):
        encoder.pooler = None  # pyright: ignore[reportArgumentType]
    return encoder


AutoConfig.register(MeanPooledConfig.model_type, MeanPooledConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPooledConfig, MeanPooledClassifier, exist_ok=True)
