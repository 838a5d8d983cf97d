"""What stands in for the Hub in the tests of recipes: models of the same architecture, data of the same columns."""

import json
from pathlib import Path

import trl
from samples import TOKENIZER, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
SMALL = {
    "vocab_size": 520,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
DECODER = {**SMALL, "num_key_value_heads": 1, "head_dim": 16}


def _tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _qwen3(folder, tied):
    # 64 is the block of a 4-bit quantisation
    wide = {**DECODER, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    Qwen3ForCausalLM(Qwen3Config(**wide, tie_word_embeddings=tied)).save_pretrained(folder)
    tokenizer = _tokenizer(folder)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        }
    )
    tokenizer.chat_template = (CHAT_TEMPLATES / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(folder)


def _llama(folder):
    LlamaForCausalLM(LlamaConfig(**DECODER)).save_pretrained(folder)
    _tokenizer(folder)


def _modernbert(folder):
    config = ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2)
    ModernBertForMaskedLM(config).save_pretrained(folder)
    _tokenizer(folder)


def _t5(folder):
    config = T5Config(
        vocab_size=520,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=2,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = _tokenizer(folder)
    # as T5's: the end stands after every text
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.save_pretrained(folder)


def _minilm(folder):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    inner = folder.with_name(f"{folder.name}-transformer")
    BertModel(BertConfig(**SMALL)).save_pretrained(inner)
    _tokenizer(inner)
    SentenceTransformer(modules=[Transformer(str(inner)), Pooling(32, "mean"), Normalize()]).save(str(folder))


MODELS = {
    "Qwen/Qwen3-0.6B": lambda folder: _qwen3(folder, tied=True),
    "Qwen/Qwen3-8B": lambda folder: _qwen3(folder, tied=False),
    "meta-llama/Llama-3.2-1B": _llama,
    "answerdotai/ModernBERT-base": _modernbert,
    "google/flan-t5-base": _t5,
    "sentence-transformers/all-MiniLM-L6-v2": _minilm,
}


def build_model(hub_id, folder):
    """A model of the architecture of `hub_id`, 32 wide, with a tokenizer, in `folder`."""
    set_seed(0)
    folder.mkdir(parents=True)
    MODELS[hub_id](folder)
    return folder


def _message(role, content):
    return {"content": content, "role": role}


def _chat(index, answer):
    return [
        _message("user", f"Say {index}."),
        _message("assistant", f"{index}"),
        _message("user", "And then?"),
        _message("assistant", answer),
    ]


ROWS = {
    "trl-lib/Capybara": lambda index: {
        "source": "GOAT",
        "messages": _chat(index, f"{index + 1}"),
        "num_turns": 2,
    },
    "trl-lib/ultrafeedback_binarized": lambda index: {
        "chosen": _chat(index, "yes, of course"),
        "rejected": _chat(index, "no"),
        "score_chosen": 8.5,
        "score_rejected": 3.0,
    },
    "timdettmers/openassistant-guanaco": lambda index: {
        "text": f"### Human: Say {index}.### Assistant: {index}, and gladly."
    },
    "mteb/banking77": lambda index: {
        "text": f"where is my card {index}?",
        "label": index % 3,
        "label_text": ("card_arrival", "card_linking", "exchange_rate")[index % 3],
    },
    "grammarly/coedit": lambda index: {
        "_id": str(index),
        "task": "gec",
        "src": f"Fix grammar: I has {index} apple.",
        "tgt": f"I have {index} apples.",
    },
    "sentence-transformers/stsb": lambda index: {
        "sentence1": f"A plane {index} takes off.",
        "sentence2": "A plane lands.",
        "score": (index % 5) / 4,
    },
}


def stand_in_data(recipe, folder):
    """Overrides that replace the data of the Hub by rows of the same columns, written into `folder`."""
    data = recipe["data"]
    rows = [ROWS[data["dataset"]](index) for index in range(12)]
    for split in data["splits"]:
        write_rows(folder / f"{split}.jsonl", rows)
    files = {split: str(folder / f"{split}.jsonl") for split in data["splits"]}
    return ["data.dataset=", "data.splits=", f"data.files={json.dumps(files)}"]
