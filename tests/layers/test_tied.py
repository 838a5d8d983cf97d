"""Tied embeddings: one adapter, one weight, adapted once; in the embedding, and transposed in the output layer."""

import copy
import re
from typing import Any

import pytest
import torch
from formula import (
    HALF_TOLERANCE,
    activate,
    assert_close,
    assert_same_bits,
    bits,
    configure,
    copies,
    formula,
    layers,
    set_scale,
    stored,
)
from peft import PeftModel, get_peft_model
from tiny_models import FORMS
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

# PEFT, of every model whose embeddings are tied, and of every embedding that it saves
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TOKENS, WIDTH = 20, 16
TIED = [form for form, fields in FORMS.items() if fields.get("side", "auto") in ("auto", "output")]
IDS = torch.randint(3, TOKENS, (2, 6), generator=torch.Generator().manual_seed(1))
HEADS = {
    "llama": ["lm_head"], "gemma3": ["lm_head"], "phi": ["lm_head"], "square": ["lm_head"],
    "t5": ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """`square` has as many tokens as features, which hides a transpose; the output layer of phi has a bias."""
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    shape = {"vocab_size": TOKENS, "hidden_size": TOKENS if kind == "square" else WIDTH, "intermediate_size": 24}
    if kind == "t5":
        config = T5Config(
            vocab_size=TOKENS, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, **tokens,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
    elif kind == "phi":
        model = PhiForCausalLM(PhiConfig(**tokens, **shape, num_hidden_layers=1, num_attention_heads=2))
        nn.init.normal_(model.lm_head.bias)
    elif kind == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**small, **tokens, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(**small, **tokens, **shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def adapt(kind: str, form: str = "scaled", dtype: torch.dtype = torch.float64, **changes: Any) -> PeftModel:
    model = build(kind, dtype)
    torch.manual_seed(1)
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, **changes}
    return get_peft_model(model, configure(form, **options)).eval()


def batch(kind: str) -> dict[str, Tensor]:
    return {"input_ids": IDS, "labels": IDS} if kind == "t5" else {"input_ids": IDS}


def run(model: nn.Module, kind: str) -> Tensor:
    return model(**batch(kind)).logits


def expected(kind: str, table: Tensor, tensors: dict[str, Tensor], form: str, scale: float = 1.0) -> Tensor:
    return formula(table.detach().double().T, tensors, FORMS[form]["mode"], "output", scale).T


def reference(kind: str, table: Tensor) -> Tensor:
    """Logits of a float64 base model whose one tied weight is `table`."""
    base = build(kind)
    name = "shared" if kind == "t5" else "model.embed_tokens"
    return functional_call(base, {f"{name}.weight": table}, kwargs=batch(kind), tie_weights=True).logits


def embedding(model: PeftModel) -> Any:
    return model.base_model.model.get_input_embeddings()


def heads(model: PeftModel, kind: str) -> list[Any]:
    return [model.base_model.model.get_submodule(name) for name in HEADS[kind]]


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("form", TIED)
@pytest.mark.parametrize("kind", HEADS)
def test_forward_gradients_and_merge_follow_the_formula(kind, form, scale):
    model = adapt(kind, form)
    set_scale(model, scale)
    source = embedding(model)
    assert len(layers(model)) == 1 + len(HEADS[kind])
    leaves = copies(source)
    table = expected(kind, build(kind).get_input_embeddings().weight, leaves, form, scale)
    y, want = run(model, kind), reference(kind, table)
    assert_close(y, want, 1e-10)
    assert (want - run(build(kind), kind)).abs().max() > 1e-3
    g = torch.randn_like(y)
    y.backward(g)
    want.backward(g)
    # both uses of the weight reach the one adapter, but that padding has no gradient in the embedding
    for part, parameter in stored(source).items():
        assert_close(parameter.grad, leaves[part].grad, 1e-8, part)
    before = bits(model)
    model.merge_adapter()
    weight = source.get_base_layer().weight
    assert_close(weight, table, 1e-12)
    for head in heads(model, kind):
        assert head.get_base_layer().weight is weight
        assert head.merged_adapters == ["default"]
    assert_close(run(model, kind), want, 1e-10)
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers(model))
    assert_same_bits(bits(model), before)
    assert torch.equal(run(model, kind), y)


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"], r".*(q|embed_tokens)"]
)
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_either_name_ties_all(kind, targets):
    model = adapt(kind, target_modules=targets)
    for head in heads(model, kind):
        assert head.tied_to["default"] is embedding(model)
        for part, parameter in stored(head).items():
            assert parameter is stored(embedding(model))[part]
    tied = [name for name, _ in model.named_parameters() if "dlor_" in name and re.search("embed|shared|head", name)]
    assert len(tied) == 3


def test_embeddings_of_other_names_are_tied():
    """ensure_weight_tying speaks of the input embedding, whatever a model calls it."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=32, **tokens))
    model = get_peft_model(base.eval(), configure("scaled", target_modules=["wte"], ensure_weight_tying=True)).eval()
    assert len(layers(model)) == 2
    want = model(input_ids=IDS).logits
    model.merge_adapter()
    assert_close(model(input_ids=IDS).logits, want, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_training_keeps_the_tie(kind):
    model = adapt(kind, init_weights=True).train()
    base = bits(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 3
    optimizer = torch.optim.AdamW(trained, 0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(model, kind).flatten(0, 1), IDS.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert_same_bits(bits(model), base)
    for head in heads(model, kind):
        for part, parameter in stored(head).items():
            assert parameter is stored(embedding(model))[part]
    model.eval()
    want = run(model, kind)
    model.merge_adapter()
    assert_close(run(model, kind), want, 1e-10)


@pytest.mark.parametrize("dtype", HALF_TOLERANCE)
def test_precision(dtype):
    for form in TIED:
        model = adapt("llama", form, dtype)
        source = embedding(model)
        assert all(tensor.dtype is torch.float32 for tensor in stored(source).values())
        assert stored(source)["dlor_diag" if FORMS[form].get("diagonal") != "none" else "dlor_U"] is next(
            iter(stored(model.base_model.model.lm_head).values())
        )
        table = expected("llama", source.get_base_layer().weight, copies(source), form)
        model.merge_adapter()
        merged = source.get_base_layer().weight
        assert model.base_model.model.lm_head.get_base_layer().weight is merged
        assert_close(merged, table, HALF_TOLERANCE[dtype], form)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", ["llama", "t5", "square"])
def test_save_and_load(kind, low_cpu_mem_usage, tmp_path):
    for form in ("additive", "scaled", "multiplicative-output-3"):
        model = adapt(kind, form, torch.float32)
        model.save_pretrained(tmp_path / form)
        loaded = PeftModel.from_pretrained(
            build(kind, torch.float32), tmp_path / form, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True
        ).eval()
        assert torch.equal(run(loaded, kind), run(model, kind))
        for head in heads(loaded, kind):
            # PEFT saves the embeddings too, and gives each layer its own where it assigns what it loads
            assert head.get_base_layer().weight is embedding(loaded).get_base_layer().weight
            for part, parameter in stored(head).items():
                assert parameter is stored(embedding(loaded))[part]
        want = run(loaded, kind)
        loaded.merge_adapter()
        assert_close(run(loaded, kind), want, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_saved_while_merged(kind, tmp_path):
    """PEFT saves the weight of an adapted embedding as well: that of the base, or loading would adapt it twice."""
    model = adapt(kind, "scaled", torch.float32)
    want = run(model, kind)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(kind, torch.float32), tmp_path)
    assert_close(run(loaded, kind), want, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "t5"])
def test_merge_and_unload_keeps_one_weight(kind, tmp_path):
    model = adapt(kind, "additive", torch.float32)
    want = run(model, kind)
    plain = model.merge_and_unload()
    assert not layers(plain)
    assert list(plain.state_dict()) == list(build(kind).state_dict())
    weight = plain.get_input_embeddings().weight
    for name in HEADS[kind]:
        assert plain.get_submodule(name).weight is weight
    assert plain.config.tie_word_embeddings
    assert_close(run(plain, kind), want, 1e-5)
    plain.save_pretrained(tmp_path)
    assert_close(run(type(plain).from_pretrained(tmp_path).eval(), kind), want, 1e-5)


def test_unload_gives_back_the_base():
    plain = adapt("llama", "scaled").unload()
    assert_same_bits(plain.state_dict().values(), build("llama").state_dict().values())
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def add(model: PeftModel, name: str, form: str, **changes: Any) -> None:
    torch.manual_seed(2)
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, **changes}
    model.add_adapter(name, configure(form, **options))
    model.eval()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_second_adapter_is_tied_as_the_first(kind):
    model = adapt(kind, "scaled")
    first = run(model, kind)
    add(model, "second", "multiplicative-output-3")
    for head in heads(model, kind):
        assert sorted(head.form) == ["default", "second"]
        for part, parameter in stored(head, "second").items():
            assert parameter is stored(embedding(model), "second")[part]
    assert torch.equal(run(model, kind), first)
    weight = build(kind).get_input_embeddings().weight
    forms = {"default": "scaled", "second": "multiplicative-output-3"}
    for order in (["second"], ["default", "second"], ["second", "default"]):
        activate(model, *order)
        table, before = weight, bits(model)
        for name in order:
            table = expected(kind, table, copies(embedding(model), name), forms[name])
        want = reference(kind, table)
        assert_close(run(model, kind), want, 1e-10)
        model.merge_adapter()
        assert_close(run(model, kind), want, 1e-10)
        model.unmerge_adapter()
        assert_same_bits(bits(model), before)
    model.delete_adapter("second")
    activate(model, "default")
    assert torch.equal(run(model, kind), first)


def test_a_loaded_second_adapter_is_tied(tmp_path):
    saved = adapt("llama", "multiplicative-output-3", torch.float32)
    saved.save_pretrained(tmp_path)
    model = adapt("llama", "scaled", torch.float32)
    result = model.load_adapter(tmp_path, "second")
    assert not result.unexpected_keys
    activate(model, "second")
    assert torch.equal(run(model, "llama"), run(saved, "llama"))


def test_mixed_batch():
    model, names = adapt("llama", "scaled"), ["__base__", "default"]
    want = torch.stack([run(build("llama"), "llama")[0], run(model, "llama")[1]])
    assert_close(model(input_ids=IDS, adapter_names=names).logits, want, 1e-12)


def test_a_copy_is_tied_within_itself():
    model = adapt("llama", "scaled")
    twin = copy.deepcopy(model)
    head, source = twin.base_model.model.lm_head, embedding(twin)
    assert head.tied_to["default"] is source
    assert source is not embedding(model)
    assert all(parameter is stored(source)[part] for part, parameter in stored(head).items())
    want = run(model, "llama")
    twin.merge_adapter()
    assert torch.equal(run(model, "llama"), want)
    assert_close(run(twin, "llama"), want, 1e-10)


def test_disabling_while_merged():
    base = run(build("llama"), "llama")
    model = adapt("llama", "scaled")
    want = run(model, "llama")
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, "llama"), base)
    assert torch.equal(run(model, "llama"), want)


@pytest.mark.parametrize("through", ["embedding", "output layer"])
def test_one_layer_of_a_tie_is_never_unmerged_alone(through):
    """Disabled adapters unmerge in the layers that are called; inputs_embeds, for one, calls no embedding."""
    base, model = build("llama"), adapt("llama", "scaled")
    want, embedded = run(model, "llama"), base.get_input_embeddings()(IDS)
    plain = base(inputs_embeds=embedded).logits
    model.merge_adapter()
    with model.disable_adapter():
        if through == "embedding":
            assert torch.equal(embedding(model)(IDS), embedded)
        else:
            assert torch.equal(model(inputs_embeds=embedded).logits, plain)
    assert_close(run(model, "llama"), want, 1e-10)
    model.merge_adapter()
    assert_close(run(model, "llama"), want, 1e-10)


def test_merging_the_output_layer_alone_merges_once():
    model = adapt("llama", "scaled")
    want, before = run(model, "llama"), bits(model)
    head = model.base_model.model.lm_head
    head.merge()
    assert_close(run(model, "llama"), want, 1e-10)
    head.unmerge()
    assert_same_bits(bits(model), before)
    assert torch.equal(run(model, "llama"), want)


def test_an_adapter_of_one_tied_layer_alone_is_not_merged():
    """Beside a tied one: its update is of one layer, the weight is of two. Where one cannot be merged, none is."""
    model = adapt("llama", "scaled")
    add(model, "second", "scaled", target_modules=["q_proj", "lm_head"], ensure_weight_tying=False)
    activate(model, "second")
    want, before = run(model, "llama"), bits(model)
    with pytest.raises(ValueError, match="ensure_weight_tying=True"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model))
    assert_same_bits(bits(model), before)
    assert torch.equal(run(model, "llama"), want)


def test_the_update_of_a_merged_tie_is_that_of_the_base():
    model = adapt("llama", "scaled")
    want = [layer.get_delta_weight("default") for layer in layers(model)]
    model.merge_adapter()
    for layer, delta in zip(layers(model), want, strict=True):
        assert_close(layer.get_delta_weight("default"), delta, 1e-12)


def test_an_excluded_embedding_is_an_error():
    with pytest.raises(ValueError, match=r"ties 'lm_head' to the adapter of the input embedding, which has none"):
        adapt("llama", target_modules=["lm_head"], exclude_modules=["embed_tokens"])


def test_a_side_that_the_embedding_cannot_have_is_an_error():
    for changes in ({"side": "input"}, {"side": "both"}, {"mode": "multiplicative", "side": "input"}):
        with pytest.raises(ValueError, match="input features of an embedding are its tokens"):
            adapt("llama", **changes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_nothing_to_tie_warns():
    with pytest.warns(UserWarning, match="no tied modules are added"):
        adapt("llama", target_modules=["q_proj"])
    untied = LlamaForCausalLM(LlamaConfig(**{**build("llama").config.to_dict(), "tie_word_embeddings": False}))
    with pytest.warns(UserWarning, match="no tied modules were found"):
        model = get_peft_model(untied, configure("scaled", target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert len(layers(model)) == 1


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["model.embed_tokens", "lm_head"]])
def test_modules_to_save_share_the_trained_weight(saved, tmp_path):
    """PEFT trains a copy of the embedding in full; the output layer has to use that copy."""
    model = adapt("llama", "scaled", torch.float32, target_modules=["q_proj"], modules_to_save=saved)
    source, head = (
        embedding(model).modules_to_save["default"],
        model.base_model.model.lm_head.modules_to_save["default"],
    )
    assert head.weight is source.weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    run(model, "llama").square().mean().backward()
    before = source.weight.detach().clone()
    optimizer.step()
    assert head.weight is source.weight
    assert not torch.equal(source.weight, before)
    assert not any(".lm_head." in name for name, p in model.named_parameters() if p.requires_grad)
    want = run(model, "llama")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama", torch.float32), tmp_path)
    assert torch.equal(run(loaded, "llama"), want)
    plain = model.merge_and_unload()
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    assert_close(run(plain, "llama"), want, 1e-5)


@pytest.mark.parametrize(("kind", "target"), [("t5", "q"), ("phi", "q_proj")])
def test_modules_to_save_of_other_layers_than_a_plain_output(kind, target):
    """PEFT puts a linear layer without bias in the place of all that is tied: embeddings, and layers with a bias."""
    refusal, changes = None, {"target_modules": [target], "modules_to_save": ["lm_head"]}
    try:
        model = adapt(kind, init_weights=True, **changes)
    except ValueError as error:
        refusal = str(error)
    if refusal is None:
        assert_close(run(model, kind), run(build(kind), kind), 1e-10)
    else:
        assert "modules_to_save" in refusal


def test_a_second_module_to_save_is_tied_as_the_first():
    changes = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = adapt("llama", "scaled", **changes)
    add(model, "second", "scaled", **changes)
    for name in ("default", "second"):
        source = embedding(model).modules_to_save[name]
        assert model.base_model.model.lm_head.modules_to_save[name].weight is source.weight


def test_a_weighted_sum_is_tied_and_exact():
    model = adapt("llama", "scaled")
    add(model, "second", "scaled")
    source, head = layers(model)
    want = 0.5 * source.get_delta_weight("default") - 2 * source.get_delta_weight("second")
    model.base_model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", "cat")
    for layer in (source, head):
        assert_close(layer.get_delta_weight("sum"), want, 1e-6)
    assert all(parameter is stored(source, "sum")[part] for part, parameter in stored(head, "sum").items())


def test_a_module_to_save_beside_the_tie_is_kept():
    model = adapt("llama", "scaled", torch.float32, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    assert model.peft_config["default"].modules_to_save == ["norm", "model.embed_tokens"]
    assert model.base_model.model.model.norm.modules_to_save["default"].weight.requires_grad
