"""The repositories on the Hub that the suite loads from, and what stands in for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

VOCABULARY = 1024
OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
BERT = "peft-internal-testing/tiny-random-BertModel"
WHISPER = "peft-internal-testing/tiny-random-whisper"

_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_LLAMA, "num_hidden_layers": 4, "max_position_embeddings": 128, "type_vocab_size": 2}
_OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_attention_heads": 4, "max_position_embeddings": 128}

_MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

MODELS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    (
        "OPTForCausalLM",
        {**_OPT, "ffn_dim": 4, "num_hidden_layers": 5},
        (OPT,),
    ),
    (
        "OPTForCausalLM",
        {**_OPT, "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 64, "num_hidden_layers": 12},
        ("peft-internal-testing/opt-125m", "facebook/opt-125m"),
    ),
    (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128},
        (
            "gpt2",
            "openai-community/gpt2",
            "hf-internal-testing/tiny-random-gpt2",
            "peft-internal-testing/tiny-random-gpt2",
            "peft-internal-testing/tiny-random-GPT2LMHeadModel",
        ),
    ),
    (
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
        ("peft-internal-testing/tiny-random-GPTJForCausalLM",),
    ),
    (
        "LlamaForCausalLM",
        _LLAMA,
        (
            "trl-internal-testing/tiny-random-LlamaForCausalLM",
            "hf-internal-testing/tiny-random-LlamaForCausalLM",
            "peft-internal-testing/tiny-random-LlamaForCausalLM",
        ),
    ),
    ("Qwen2ForCausalLM", {**_LLAMA, "num_key_value_heads": 2}, ("peft-internal-testing/tiny-dummy-qwen2",)),
    (
        "MistralForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2},
        ("hf-internal-testing/tiny-random-MistralForCausalLM",),
    ),
    (
        "Gemma3ForCausalLM",
        {**_LLAMA, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0},
        ("hf-internal-testing/tiny-random-Gemma3ForCausalLM",),
    ),
    (
        "BertForSequenceClassification",
        _BERT,
        ("bert-base-uncased", "peft-internal-testing/tiny-random-BertForSequenceClassification"),
    ),
    (
        "RobertaForSequenceClassification",
        _BERT,
        ("peft-internal-testing/tiny-random-RobertaForSequenceClassification",),
    ),
    (
        "LlamaForSequenceClassification",
        _LLAMA,
        ("trl-internal-testing/tiny-LlamaForSequenceClassification-3.2",),
    ),
    # has what the model needs with and without its head
    ("BertForPreTraining", _BERT, (BERT, "hf-internal-testing/tiny-random-BertModel")),
    ("RobertaModel", _BERT, ("peft-internal-testing/tiny-random-RobertaModel",)),
    (
        "DebertaModel",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        ("peft-internal-testing/tiny-random-DebertaModel",),
    ),
    (
        "DebertaV2Model",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        ("peft-internal-testing/tiny-random-DebertaV2Model",),
    ),
    (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        (
            "peft-internal-testing/tiny-random-t5",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "google/flan-t5-small",
        ),
    ),
    (
        "BartForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
        },
        ("peft-internal-testing/tiny-random-BartForConditionalGeneration",),
    ),
    (
        "WhisperForConditionalGeneration",
        {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "decoder_start_token_id": 1,
        },
        (WHISPER,),
    ),
    (
        "BloomForCausalLM",
        {"hidden_size": 16, "n_layer": 5, "n_head": 4},
        ("peft-internal-testing/tiny-random-BloomForCausalLM",),
    ),
    (
        "GPTNeoXForCausalLM",
        {**_LLAMA, "max_position_embeddings": 128},
        ("peft-internal-testing/tiny-random-GPTNeoXForCausalLM",),
    ),
    ("Qwen2ForCausalLM", {**_LLAMA, "num_key_value_heads": 2}, ("Qwen/Qwen2-0.5B",)),
    (
        "Qwen3MoeForCausalLM",
        {**_LLAMA, **_MOE, "head_dim": 4, "num_key_value_heads": 2},
        ("trl-internal-testing/tiny-Qwen3MoeForCausalLM", "hf-internal-testing/tiny-qwen3-moe"),
    ),
    ("MixtralForCausalLM", {**_LLAMA, **_MOE, "num_key_value_heads": 2}, ("hf-internal-testing/Mixtral-tiny",)),
    (
        "Llama4ForCausalLM",
        {**_LLAMA, **_MOE, "head_dim": 4, "num_key_value_heads": 2, "intermediate_size_mlp": 32},
        ("trl-internal-testing/tiny-Llama4ForCausalLM",),
    ),
    (
        "GptOssForCausalLM",
        {**_LLAMA, **_MOE, "head_dim": 4, "num_key_value_heads": 2},
        ("trl-internal-testing/tiny-GptOssForCausalLM",),
    ),
    (
        "FalconMambaForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        ("tiiuae/falcon-mamba-tiny-dev",),
    ),
    (
        "ResNetForImageClassification",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1], "num_labels": 3},
        ("peft-internal-testing/tiny-random-ResNetForImageClassification",),
    ),
    (
        "CLIPTextModel",
        {**_LLAMA, "num_hidden_layers": 3, "max_position_embeddings": 77, "projection_dim": 16},
        ("peft-internal-testing/tiny-clip-text-2",),
    ),
    (
        "NemotronHForCausalLM",
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 4,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
            "layers_block_type": ["mamba", "attention", "moe"],
        },
        ("trl-internal-testing/tiny-NemotronHForCausalLM-nano",),
    ),
    (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                **_LLAMA,
                "vocab_size": VOCABULARY,
                "num_key_value_heads": 2,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_heads": 4,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [1],
            },
        },
        ("trl-internal-testing/tiny-Qwen2_5_VLForConditionalGeneration",),
    ),
]
"""Class of the model, arguments of its config, names on the Hub."""


@dataclass(frozen=True)
class Adapter:
    """A DLoR adapter under the name of one of LoRA's."""

    base: str
    """The model that it was made for."""

    auto_class: str
    """What follows AutoModel in the name of the class that loads the model."""

    task: str | None
    """Its task_type."""

    revisions: tuple[str, ...] = ("main",)
    """Branches and tags."""

    vocabulary: int = VOCABULARY
    """Size to which the embedding of the model was changed."""

    holds_base: bool = False
    """Whether the model lies in the same repository."""


ADAPTERS = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": Adapter(OPT, "ForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": Adapter(
        OPT, "ForCausalLM", "CAUSAL_LM", vocabulary=VOCABULARY + 2
    ),
    "peft-internal-testing/opt-tokenizer-revision": Adapter(
        OPT, "ForCausalLM", "CAUSAL_LM", ("main", "my-revision"), holds_base=True
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": Adapter(OPT, "", "FEATURE_EXTRACTION"),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": Adapter(OPT, "ForQuestionAnswering", "QUESTION_ANS"),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": Adapter(
        OPT, "ForSequenceClassification", "SEQ_CLS"
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": Adapter(
        "gpt2", "ForTokenClassification", "TOKEN_CLS"
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": Adapter(
        "peft-internal-testing/tiny-random-t5", "ForSeq2SeqLM", "SEQ_2_SEQ_LM"
    ),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": Adapter(WHISPER, "ForSpeechSeq2Seq", None),
    "peft-internal-testing/gpt2-lora-random": Adapter("gpt2", "ForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/tiny-random-BertModel-lora": Adapter(
        "hf-internal-testing/tiny-random-BertModel", "ForCausalLM", "CAUSAL_LM", ("main", "v1.2.3")
    ),
}
"""Adapters that tests load without saying of which method: name on the Hub -> what stands in for it."""
