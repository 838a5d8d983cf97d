"""Direct preference optimisation."""

from several import write_task_recipe

from dlor_peft.cli import main


def test_a_start_that_moves_the_base_has_no_reference(tmp_path, capsys):
    path = write_task_recipe(tmp_path, "dpo")
    words = ["adapter.peft_type=LORA", "adapter.init_lora_weights=pissa", "training.max_steps=1"]
    assert main(["train", str(path), *words]) == 2
    assert "adapter: its start changes the weights of the base model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["train", str(path), words[0], "adapter.init_lora_weights=gaussian", words[2]]) == 0
