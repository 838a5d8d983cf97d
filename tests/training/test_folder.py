import json

import pytest

from dlor_peft.training.folder import RunFolder, atomic


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def write():
        with atomic(tmp_path / "metrics.json") as partial:
            partial.write_text('{"accuracy": ')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_content(tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").touch()

    def write():
        with atomic(target) as partial:
            partial.mkdir()
            (partial / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert [path.name for path in target.iterdir()] == ["old"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").touch()
    with atomic(target) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_results_that_cannot_be_written_leave_no_metrics(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(TypeError):
        folder.write_metrics({"accuracy": object()})
    assert not folder.metrics.exists()
    folder.write_metrics({"accuracy": 1.0})
    assert json.loads(folder.metrics.read_text()) == {"accuracy": 1.0}


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "curves.png", "recipe.yaml", "metrics.json"])
def test_what_no_run_wrote_is_not_replaced(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"output_dir: .*{name} is not of a dlor run\. Choose another folder"):
        RunFolder(tmp_path).check(overwrite=False)


def test_the_output_folder_must_be_a_folder(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"output_dir: .*out is a file\. Give a folder"):
        RunFolder(tmp_path / "out").check(overwrite=False)
