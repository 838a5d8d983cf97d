"""scripts/paper.py in small: the laws that its experiments measure, and the files that it leaves."""

from __future__ import annotations

import importlib
import json
import math
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")


@pytest.fixture
def paper():
    return importlib.import_module("paper")


@pytest.fixture
def run(paper, monkeypatch, tmp_path):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paper.py", "--quick", "--out", str(tmp_path), *arguments])
        threads = torch.get_num_threads()
        try:
            assert paper.main() == 0
        finally:
            torch.set_num_threads(threads)
        return json.loads((tmp_path / "numbers.json").read_text())

    return run


@pytest.fixture
def part(paper):
    return lambda name: importlib.import_module(f"paper_parts.{name}")


def test_interpolation_and_reconstruction_are_exact(run, tmp_path):
    parts = run("--only", "a,d")
    assert list(parts) == ["a", "d"]
    for rows in parts["a"]["numbers"]["activations"].values():
        assert max(rows["noise"] + rows["function"]) < 1e-9
        assert min(rows["fresh"]) > 0.95 * parts["a"]["numbers"]["floor"]
    for rows in parts["d"]["numbers"].values():
        for row in rows:
            assert row["sum_terms"] == row["product_factors"] == row["bound"]
            assert max(row["sum_error"], row["product_error"]) < 1e-12
    names = {"interpolation.png", "reconstruction.png", "numbers.json", "captions.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    captions = (tmp_path / "captions.md").read_text()
    assert captions.count("**Agrees.**") == captions.count("**Claim.**") == captions.count("quick run") == 2


def test_a_part_is_added_to_those_that_are_there(run, tmp_path):
    first = run("--only", "d")
    rows = run("--only", "b")
    assert rows["d"] == first["d"]
    assert list(rows) == ["b", "d"]
    (blind,) = rows["b"]["numbers"]["x1 x2"]
    assert max(blind["across_before"] + blind["across_after"]) < 1e-9
    assert blind["floor"] == pytest.approx(0.5)
    assert min(blind["errors"]) > 0.97 * blind["floor"]
    assert {alpha for alphas in blind["alphas"] for alpha in alphas} == {0}
    captions = (tmp_path / "captions.md").read_text()
    assert captions.index("blindness.png") < captions.index("reconstruction.png")


def test_the_captions_are_those_of_the_numbers_beside_them(paper):
    folder = paper.ROOT / "recipes" / "paper"
    parts = json.loads((folder / "numbers.json").read_text())
    assert list(parts) == list(paper.PARTS)
    assert paper.captions(parts) == (folder / "captions.md").read_text()
    for letter, part in parts.items():
        assert len(paper.PARTS[letter].draw(part["numbers"]).axes) >= 1
        assert (folder / paper.file_name(letter)).stat().st_size > 5_000


def test_an_unknown_part_is_refused(paper, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper.py", "--only", "a,z"])
    with pytest.raises(SystemExit):
        paper.main()
    assert "'z' is none of a, b, c, d, e, f" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["no json", "[]", '{"a": {"quick": false}}'])
def test_numbers_of_something_else_are_not_replaced(paper, monkeypatch, capsys, tmp_path, text):
    (tmp_path / "numbers.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["paper.py", "--only", "d", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        paper.main()
    assert "paper.py: error: --out: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    assert (tmp_path / "numbers.json").read_text() == text


def test_times_are_those_of_their_machine(paper):
    parts = json.loads((paper.ROOT / "recipes" / "paper" / "numbers.json").read_text())
    parts["f"]["environment"] = {**parts["f"]["environment"], "cpu": "another"}
    assert f"Run on another, 1 thread, torch {parts['f']['environment']['versions']['torch']}, in " in paper.captions(
        parts
    )


@pytest.mark.parametrize(("activation", "b", "order"), [("GELU", 0.5, 1), ("tanh", 0.5, 1), ("tanh", 0, 2)])
def test_remainders_have_the_order_of_the_next_derivative(part, activation, b, order):
    activations = part("activations")
    A = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for error in (
        lambda h: activations.remainder(activation, b, h, torch.float64),
        lambda h: activations.through_activations(A, activation, b, h, torch.float64),
    ):
        assert math.log10(error(1e-2) / error(1e-3)) == pytest.approx(order, abs=0.1)


def test_the_floor_is_the_conditional_variance(part):
    """Of x^T A x given v^T x, over the directions v of the plane: E Var(g | t) = Var g - Var E(g | t)."""
    blindness = part("blindness")
    for name, target in blindness.TARGETS.items():
        assert target.floor == pytest.approx(1 - 1 / len(target.A) if "d =" in name else 0.5)
    torch.manual_seed(0)
    x, y = blindness.sample(blindness.TARGETS["x1 x2"], 200_000)
    angles = torch.linspace(0, math.pi, 33, dtype=torch.float64)[:-1]
    t = x @ torch.stack([angles.cos(), angles.sin()])
    # E(g | t) is a multiple of t^2 - 1
    explained = ((t**2 - 1) * y).mean(0).square() / (t**2 - 1).square().mean(0)
    assert 1 - explained.max().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_the_sawtooth_is_a_network_of_rank_one_and_one_hidden_layer(part, times):
    sawtooth = part("sawtooth")
    x = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
    y = sawtooth.tent(x, times)
    for net in (sawtooth.exact(times), sawtooth.exact_shallow(times)):
        assert (net(x) - y).abs().max() < 1e-12
    turns = sawtooth.tent(torch.arange(2**times + 1, dtype=torch.float64) / 2**times, times)
    assert turns.tolist() == [0, 1] * 2 ** (times - 1) + [0]


def test_nets_of_an_ensemble_train_as_they_do_alone(part):
    networks = part("networks")
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def make():
        return networks.dlor_net(2, 4, 2, "tanh", "from zero")

    two, one = (networks.Ensemble(make, number).train(lambda: (x, x[:, :1]), 5, 1e-2) for number in (2, 1))
    torch.testing.assert_close(two(x)[:1], one(x))
    assert two.num_parameters == sum(p.numel() for p in make().parameters())


def test_contestants_of_the_sawtooth_have_the_same_number_of_parameters(part):
    sawtooth = part("sawtooth")
    for kind in sawtooth.KINDS:
        number = part("networks").count(sawtooth.build(kind, sawtooth.width_of(kind)))
        assert number == pytest.approx(sawtooth.BUDGET, rel=0.05)
