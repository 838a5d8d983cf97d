import pytest

from dlor_peft.training.sources import COMMAND_LINE, DEFAULT, RECIPE_FILE, Sources, find_recipe, parse_yaml

TEXT = "adapter: {peft_type: DLOR, mode: scaled, r: 8}\ntask: sft\noutput_dir: out\n"


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-2E+4", -2e4), ("5e3", 5e3), (".5e-1", 0.05), ("1.5e-3", 1.5e-3), ("10", 10), ("e-3", "e-3")],
)
def test_numbers_read_as_in_yaml_1_2(text, value):
    assert parse_yaml(text, "here") == value


def test_a_duplicate_key_is_an_error_with_its_line():
    with pytest.raises(ValueError, match=r"recipe\.yaml, line 3: .*'r' stands twice"):
        parse_yaml("adapter:\n  r: 1\n  r: 2\n", "recipe.yaml")


def test_a_text_that_is_not_yaml_names_its_source():
    with pytest.raises(ValueError, match=r"recipe\.yaml, line 1: not valid YAML"):
        parse_yaml("a: [1, 2", "recipe.yaml")


def test_overrides_lie_over_the_file_and_every_value_knows_its_origin(recipe):
    sources = Sources(recipe, ["adapter.r=4", "training.learning_rate=1e-3", "adapter.rank_pattern={a.b: 2}"])
    assert sources.values["adapter"] == {"peft_type": "DLOR", "mode": "scaled", "r": 4, "rank_pattern": {"a.b": 2}}
    assert sources.values["training"] == {"learning_rate": 1e-3}
    assert sources.origin("adapter.r") == COMMAND_LINE
    assert sources.origin("training.learning_rate") == COMMAND_LINE
    assert sources.origin("adapter.mode") == RECIPE_FILE
    assert sources.origin("task.type") == RECIPE_FILE
    assert sources.origin("seed") == DEFAULT


def test_a_mapping_replaces_its_section(recipe):
    sources = Sources(recipe, ["adapter={peft_type: LORA}"])
    assert sources.values["adapter"] == {"peft_type": "LORA"}
    assert sources.origin("adapter.peft_type") == COMMAND_LINE
    assert sources.origin("adapter.mode") == DEFAULT


def test_an_empty_value_drops_the_key_and_null_is_a_value(recipe):
    sources = Sources(recipe, ["adapter.mode=", "training.max_length=null"])
    assert sources.values["adapter"] == {"peft_type": "DLOR", "r": 8}
    assert sources.values["training"] == {"max_length": None}
    assert sources.origin("adapter.mode") == DEFAULT


def test_task_is_short_for_its_type(recipe):
    assert Sources(recipe).values["task"] == {"type": "sft"}
    sources = Sources(recipe, ["task=text-classification"])
    assert sources.values["task"] == {"type": "text-classification"}
    assert sources.origin("task.type") == COMMAND_LINE


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter..r=4", "write key=value with a dotted key"),
        ("=4", "write key=value with a dotted key"),
        ("output_dir.x=4", "output_dir is 'out', not a section"),
        ("adapter.r=[1", "override 'adapter.r=\\[1', line 1: not valid YAML"),
        ("adapter.moed=", "no adapter.moed to drop. Did you mean 'mode'\\? Set there: mode, peft_type, r"),
    ],
)
def test_wrong_overrides(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        Sources(recipe, [override])


def test_a_recipe_must_be_a_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- model\n")
    with pytest.raises(ValueError, match="a recipe is a mapping with keys"):
        Sources(tmp_path / "list.yaml")


def test_recipes_are_found_by_name_and_by_path(recipe):
    assert find_recipe(str(recipe)) == recipe
    assert find_recipe("quickstart").name == "quickstart.yaml"
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'quickstart'\? Packaged recipes: from-scratch, llama"):
        find_recipe("quikstart")
