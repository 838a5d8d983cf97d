"""The model card of an adapter says what it is and how to load it, whatever it said before."""

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny_models import adapted, build
from transformers import Trainer, TrainingArguments

import dlor_peft
from dlor_peft import DLoRConfig
from dlor_peft.card import describe


def test_a_card_is_made_where_there_is_none(tmp_path):
    describe(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "import dlor_peft" in card.text
    assert "the Python package dlor-peft" in card.text
    assert card.data.library_name == "peft"


def test_the_config_alone_writes_the_card(tmp_path):
    DLoRConfig().save_pretrained(str(tmp_path))
    assert "import dlor_peft" in (tmp_path / "README.md").read_text()


def test_a_card_keeps_its_text_and_metadata(tmp_path):
    before = "---\nlicense: mit\nbase_model: someone/something\ntags:\n- a\n- dlor\n---\n\n# Title\n\nWörds ✓\n"
    (tmp_path / "README.md").write_text(before, encoding="utf-8")
    describe(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "someone/something"
    assert card.data.tags == ["a", "dlor", "peft"]
    assert card.text.index("Wörds ✓") < card.text.index("import dlor_peft")


@pytest.mark.parametrize("before", ["", "# No metadata\n", "---\n---\nEmpty\n", "Windows\r\nlines\r\n"])
def test_a_strange_card_is_extended_without_loss(tmp_path, before):
    (tmp_path / "README.md").write_bytes(before.encode())
    describe(tmp_path)
    after = (tmp_path / "README.md").read_text()
    assert "import dlor_peft" in after
    for line in before.split("---")[-1].split():
        assert line in after


def test_twice_is_once_and_nothing_else_is_left(tmp_path):
    describe(tmp_path)
    once = (tmp_path / "README.md").read_bytes()
    describe(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == once
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_usage_runs_as_it_stands(tmp_path):
    """The code block of the card parses and imports names that exist."""
    describe(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    imports = "\n".join(line for line in code.splitlines() if "import" in line)
    names: dict = {}
    exec(imports, names)
    assert {"dlor_peft", "PeftModel"} <= set(names)


def test_saving_a_model_twice_writes_the_same_card(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == once
    assert once.count("import dlor_peft") == 1
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_the_card_says_what_the_adapter_is(tmp_path):
    config = DLoRConfig(
        r=4,
        mode="multiplicative",
        side="input",
        depth=3,
        diagonal="scalar",
        target_modules=r".*\.(q|v)_proj",
        rank_pattern={"q_proj": 2},
        base_model_name_or_path="someone/something",
    )
    config.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    for row in [
        "| base model | `someone/something` |",
        "| mode | `multiplicative` |",
        "| side | `input` |",
        "| diagonal | `scalar` |",
        "| r | 4 |",
        "| r elsewhere | `q_proj`: 2 |",
        "| depth | 3 |",
        r"| adapted modules | `.*\.(q\|v)_proj` |",
        f"| dlor-peft | `{dlor_peft.__version__}` |",
    ]:
        assert f"{row}\n" in text


def test_what_has_no_meaning_or_no_value_is_left_out(tmp_path):
    DLoRConfig(mode="additive", target_modules=["b", "a"]).save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert "| adapted modules | `a`, `b` |" in text
    for name in ("side", "base model", "r elsewhere", "depth elsewhere", "trained in full"):
        assert f"| {name} |" not in text


def test_a_later_adapter_replaces_the_former_s_part_and_nothing_else(tmp_path):
    describe(tmp_path, "load_it()\n", {"steps": "3"})
    path = tmp_path / "README.md"
    before = path.read_text()
    assert "| steps | 3 |" in before
    assert "```python\nload_it()\n```" in before
    path.write_text(f"{before}\n## Mine\n\nAfter it.\n")
    DLoRConfig(r=5).save_pretrained(str(tmp_path))
    after = path.read_text()
    # how the former was trained says nothing of this one
    assert "| steps | 3 |" not in after
    assert "load_it" not in after
    assert after.index("| r | 5 |") < after.index("import dlor_peft") < after.index("After it.")


def test_saving_a_model_keeps_the_user_s_text_and_tags_and_what_peft_writes(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# Mine\n")
    model = adapted("llama", task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path)
    once = path.read_text()
    model.save_pretrained(tmp_path)
    assert path.read_text() == once
    card = ModelCard.load(path)
    assert {"mine", "dlor", "peft", "transformers"} <= set(card.data.tags)
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == ("mit", "peft", "text-generation")
    assert "# Mine" in card.text
    assert "- PEFT " in card.text


def test_the_card_that_a_trainer_writes_says_it_too(tmp_path):
    """`Trainer.push_to_hub` writes a card of its own over the saved one and has PEFT update it."""
    model = adapted("bert", task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    Trainer(model, arguments).create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"dlor", "generated_from_trainer"} <= set(card.data.tags)
    assert "Training hyperparameters" in card.text
    assert "import dlor_peft" in card.text


def test_the_cards_of_other_methods_stay_peft_s(tmp_path):
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert "dlor" not in (tmp_path / "README.md").read_text().lower()
