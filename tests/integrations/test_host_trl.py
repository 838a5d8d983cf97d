"""TRL's trainers with DLoRConfig as `peft_config`, and what they do to the base between the steps."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_models import FEW_FORMS, FORMS, base_parameters
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from dlor_peft import DLoRConfig

# TRL switches it off while it generates and for the reference, by transformers' former name
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning")

STORIES = Path(__file__).parents[2] / "recipes" / "models" / "stories260K"
PAIRS = {
    "prompt": ["Once upon a time", "The little girl"] * 4,
    "chosen": [" there was a cat.", " went to the park."] * 4,
    "rejected": [" no no no.", " is is is."] * 4,
}
IDS = torch.arange(3, 43).reshape(2, 20)


def load(dtype="float32"):
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=dtype)


def config(form="scaled", **changes):
    return DLoRConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **FORMS[form], **changes})


def arguments(kind, folder, **changes):
    return kind(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )


def train(kind, folder, form="scaled", dtype="float32", dataset=None, options=None, callbacks=None, **settings):
    kinds = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, GRPOTrainer: GRPOConfig}
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    trainer = kind(
        load(dtype),
        args=arguments(kinds[kind], folder, **settings),
        train_dataset=Dataset.from_dict(dataset or PAIRS),
        processing_class=tokenizer,
        peft_config=config(form),
        callbacks=callbacks,
        **(options or {}),
    )
    trainer.train()
    return trainer


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def assert_base_is_untouched(model, dtype="float32"):
    fresh = dict(load(dtype).named_parameters())
    base = base_parameters(model.get_base_model())
    assert base
    for name, value in base.items():
        assert torch.equal(value, fresh[name.replace(".base_layer", "")]), name


def assert_reference_is_the_base(model, dtype="float32"):
    want = logits(load(dtype))
    assert not torch.equal(logits(model), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), want)


def test_sft(tmp_path):
    rows = {"text": ["Once upon a time there was a cat."] * 16}
    trainer = train(SFTTrainer, tmp_path, dataset=rows)
    assert_base_is_untouched(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), logits(trainer.model))


@pytest.mark.parametrize("form", FEW_FORMS)
def test_dpo_takes_its_reference_from_the_base(tmp_path, form):
    trainer = train(DPOTrainer, tmp_path, form)
    assert_base_is_untouched(trainer.model)
    assert_reference_is_the_base(trainer.model)
    # without an adapter, TRL keeps a copy of the model for it
    full = DPOTrainer(
        load(), args=trainer.args, train_dataset=Dataset.from_dict(PAIRS), processing_class=trainer.processing_class
    )
    batch = next(iter(trainer.get_train_dataloader()))
    got, want = (each.compute_ref_log_probs(each.ref_model or each.model, batch) for each in (trainer, full))
    for ours, copied in zip(got, want, strict=True):
        assert torch.equal(ours, copied)


def test_dpo_goes_on_from_an_adapter_with_a_copy_of_it_as_the_reference(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(load(), config(init_weights=False))
    start = logits(model)
    trainer = DPOTrainer(
        model.train(),
        args=arguments(DPOConfig, tmp_path),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(STORIES),
    )
    trainer.train()
    assert not torch.equal(logits(trainer.model), start)
    trainer.model.set_adapter("ref")
    assert torch.equal(logits(trainer.model), start)


def sent_to_vllm(model):
    """What TRL sends to vLLM before it generates: it merges, reads the weights and unmerges. No vLLM is there."""
    sender = VLLMGeneration.__new__(VLLMGeneration)
    sender.model = model
    sender._dist = DistributedBackend(Accelerator(cpu=True))
    return {name: value.clone() for name, value in sender._iter_named_params()}


class SendAfterEachStep(TrainerCallback):
    def __init__(self):
        self.num_sent = 0

    def on_step_end(self, args, state, control, model, **kwargs):
        merged = copy.deepcopy(model).merge_and_unload()
        sent = sent_to_vllm(model)
        assert sent.keys() == dict(merged.named_parameters()).keys()
        for name, value in merged.named_parameters():
            assert torch.equal(sent[name], value), name
        self.num_sent += 1


@pytest.mark.parametrize(
    ("form", "dtype"), [("scaled", "float32"), ("scaled", "bfloat16"), ("multiplicative-output-3", "bfloat16")]
)
def test_grpo_sends_merged_weights_and_leaves_the_base(tmp_path, form, dtype):
    sends = SendAfterEachStep()

    def length(completions, **kwargs):
        return [float(len(set(text))) for text in completions]

    trainer = train(
        GRPOTrainer,
        tmp_path,
        form,
        dtype,
        dataset={"prompt": PAIRS["prompt"]},
        options={"reward_funcs": length},
        callbacks=[sends],
        num_generations=2,
        max_completion_length=6,
        # takes the reference into the loss
        beta=0.1,
    )
    assert sends.num_sent == 2
    assert_base_is_untouched(trainer.model, dtype)
    assert_reference_is_the_base(trainer.model, dtype)


@pytest.mark.parametrize("form", FEW_FORMS)
def test_ten_merges_in_bfloat16_leave_the_base(form):
    torch.manual_seed(0)
    model = get_peft_model(load("bfloat16"), config(form, init_weights=False)).eval()
    want = logits(model)
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_base_is_untouched(model, "bfloat16")
    assert_reference_is_the_base(model, "bfloat16")
    assert torch.equal(logits(model), want)
