"""The model card of an adapter directory says how to load it, whatever it said before."""

import pytest
from huggingface_hub import ModelCard
from tiny_models import adapted

from dlor_peft import DLoRConfig
from dlor_peft.card import add_usage


def test_a_card_is_made_where_there_is_none(tmp_path):
    add_usage(tmp_path)
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
    add_usage(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.base_model == "someone/something"
    assert card.data.tags == ["a", "dlor"]
    assert card.text.index("Wörds ✓") < card.text.index("import dlor_peft")


@pytest.mark.parametrize("before", ["", "# No metadata\n", "---\n---\nEmpty\n", "Windows\r\nlines\r\n"])
def test_a_strange_card_is_extended_without_loss(tmp_path, before):
    (tmp_path / "README.md").write_bytes(before.encode())
    add_usage(tmp_path)
    after = (tmp_path / "README.md").read_text()
    assert "import dlor_peft" in after
    for line in before.split("---")[-1].split():
        assert line in after


def test_twice_is_once_and_nothing_else_is_left(tmp_path):
    add_usage(tmp_path)
    once = (tmp_path / "README.md").read_bytes()
    add_usage(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == once
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_usage_runs_as_it_stands(tmp_path):
    """The code block of the card parses and imports names that exist."""
    add_usage(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    imports = "\n".join(line for line in code.splitlines() if "import" in line)
    names: dict = {}
    exec(imports, names)
    assert {"dlor_peft", "PeftModel"} <= set(names)


def test_saving_a_model_twice_keeps_one_usage_section(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("import dlor_peft") == 1
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"
