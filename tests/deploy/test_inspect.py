"""dlor inspect: its numbers are those of the dense matrices, in the table, the JSON and the heat map alike."""

import json
import math
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from saved import adapt
from tiny_models import FORMS, TARGETS, adapted, base_weights, build, config_of, dense, layers, small
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from dlor_peft import DLoRConfig
from dlor_peft.cli import main
from dlor_peft.deploy.adapter import read_adapter
from dlor_peft.deploy.checkpoint import Checkpoint
from dlor_peft.deploy.heatmap import grid, heatmap_png
from dlor_peft.deploy.inspect import Report, inspect_adapter
from dlor_peft.deploy.tables import without_common_start
from dlor_peft.maths import alignment_index

LAYER_KEYS = {
    "module", "mode", "side", "diagonal", "depth", "r", "experts", "shapes", "dtype", "num_parameters", "num_bytes",
    "diagonal_deviation", "frobenius_norm", "spectral_norm", "effective_rank", "multiplies", "condition_bound",
    "invertible", "exact_exports", "weight",
}  # fmt: skip
WEIGHT_KEYS = {
    "name", "shape", "norm", "update_norm", "relative_update", "alignment_rows", "alignment_columns",
}  # fmt: skip


def report_of(model, folder) -> Report:
    model.save_pretrained(folder)
    return inspect_adapter(read_adapter(folder))


def dense_residual(module) -> tuple[list[Tensor], Tensor]:
    """q of each side and U V^T, from the stored tensors: the product of the factors less its diagonal."""
    stored = {
        name: getattr(module, name)["default"].weight.detach().double()
        for name in ("dlor_diag", "dlor_diag_in", "dlor_U", "dlor_V")
        if "default" in getattr(module, name)
    }
    form = module.form["default"]
    p, q = form.widths
    diagonals = [(1 + stored[name]).prod(0) - 1 for name in ("dlor_diag", "dlor_diag_in") if name in stored]
    low_rank = [
        stored["dlor_U"][k] @ stored["dlor_V"][k].T if form.r else torch.zeros(p, q) for k in range(form.depth)
    ]
    if form.mode != "multiplicative":
        return diagonals, low_rank[0]
    P, D = torch.eye(p, dtype=torch.float64), torch.eye(p, dtype=torch.float64)
    for k in range(form.depth):
        factor = torch.diag(1 + stored["dlor_diag"][k].expand(p)) if diagonals else torch.eye(p, dtype=torch.float64)
        P, D = (factor + low_rank[k]) @ P, factor @ D
    return diagonals, P - D


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_are_those_of_the_dense_matrices(form, tmp_path):
    model = small(form)
    report = report_of(model, tmp_path)
    modules = layers(model.base_model.model)
    assert [layer.module for layer in report.layers] == list(modules)
    for layer, module in zip(report.layers, modules.values(), strict=True):
        diagonals, low_rank = dense_residual(module)
        sizes = torch.linalg.svdvals(low_rank)
        assert layer.diagonal_deviation == pytest.approx(math.hypot(*(d.norm().item() for d in diagonals)), rel=1e-9)
        assert layer.frobenius_norm == pytest.approx(low_rank.norm().item(), rel=1e-9)
        assert layer.spectral_norm == pytest.approx(sizes[0].item(), rel=1e-9)
        shares = sizes[sizes > 1e-12 * sizes[0]] / sizes.sum()
        effective = (-(shares * shares.log()).sum()).exp().item() if len(shares) else 0.0
        assert layer.effective_rank == pytest.approx(effective, rel=1e-9)
        assert (layer.depth, layer.r) == (module.form["default"].depth, module.form["default"].r)
        assert layer.side in (module.form["default"].side, "auto")
    totals = report.totals
    stored = [p for name, p in model.named_parameters() if "dlor_" in name]
    assert totals["parameters"] == sum(p.numel() for p in stored)
    assert totals["bytes"] == 4 * totals["parameters"]


@pytest.mark.parametrize("form", FORMS)
def test_the_condition_bound_bounds_what_the_adapter_does_to_the_condition(form, tmp_path):
    model = small(form)
    report = report_of(model, tmp_path)
    mode, side = FORMS[form]["mode"], FORMS[form].get("side", "auto")
    for layer, (name, module) in zip(report.layers, layers(model.base_model.model).items(), strict=True):
        multiplies = mode == "multiplicative" or (mode == "scaled" and model.peft_config["default"].r == 0)
        assert layer.multiplies == multiplies
        assert (layer.invertible is None) != multiplies
        if layer.condition_bound is not None:
            W = base_weights(model)[f"base_model.model.{name}"]
            before = torch.linalg.svdvals(W.double())
            after = torch.linalg.svdvals(dense(module, "default", W, mode, side))
            assert layer.invertible
            bound = layer.condition_bound * before[0] / before[-1]
            assert after[0] / after[-1] <= bound * (1 + 1e-9)


def test_modes_by_layer(tmp_path):
    model = small("scaled", mode_pattern={"0": "multiplicative"}, depth_pattern={"0": 2}, side_pattern={"2": "both"})
    first, second = report_of(model, tmp_path).layers
    assert (first.mode, first.side, first.depth, first.multiplies) == ("multiplicative", "auto", 2, True)
    assert (second.mode, second.side, second.depth, second.multiplies) == ("scaled", "both", 1, False)


def changed(form, tmp_path, change, **options) -> Report:
    model = small(form, **options)
    with torch.no_grad():
        for module in layers(model).values():
            change({name: getattr(module, name)["default"].weight for name in module.form["default"].shapes})
    return report_of(model, tmp_path)


def zero_the_diagonals(tensors):
    for name in ("dlor_diag", "dlor_diag_in"):
        if name in tensors:
            tensors[name].zero_()


def zero_everything(tensors):
    for tensor in tensors.values():
        tensor.zero_()


def one_row_to_zero(tensors):
    tensors["dlor_diag"][0, 0] = -1


def a_projector(tensors):
    for tensor in tensors.values():
        tensor.zero_()
    tensors["dlor_U"][0, 0, 0], tensors["dlor_V"][0, 0, 0] = -1, 1


def nothing(tensors):
    pass


@pytest.mark.parametrize(
    ("form", "change", "exports"),
    [
        ("additive", nothing, ()),
        ("additive-none", nothing, ("LoRA", "DoRA")),
        ("scaled-none", nothing, ("LoRA", "DoRA")),
        ("multiplicative-none-2", nothing, ("LoRA", "DoRA")),
        ("multiplicative", nothing, ()),
        ("multiplicative", zero_the_diagonals, ("LoRA", "DoRA")),
        ("multiplicative-output-3", nothing, ("DoRA",)),
        ("multiplicative-input-3", nothing, ()),
        ("scaled-output", nothing, ("DoRA",)),
        ("scaled-output", zero_the_diagonals, ("LoRA", "DoRA")),
        ("scaled-output", one_row_to_zero, ()),
        ("scaled-output-scalar", nothing, ("DoRA",)),
        ("scaled-input", nothing, ()),
        ("scaled-both", nothing, ()),
        ("additive", zero_everything, ("LoRA", "DoRA")),
        ("scaled-both", zero_everything, ("LoRA", "DoRA")),
    ],
)
def test_exact_exports(form, change, exports, tmp_path):
    report = changed(form, tmp_path, change)
    assert {layer.exact_exports for layer in report.layers} == {exports}


@pytest.mark.parametrize(
    ("form", "change", "options", "invertible"),
    [
        ("multiplicative", nothing, {}, True),
        ("multiplicative", a_projector, {}, False),
        ("multiplicative", one_row_to_zero, {}, True),
        ("multiplicative-r0-2", one_row_to_zero, {}, False),
        ("scaled", one_row_to_zero, {"r": 0}, False),
        ("scaled", nothing, {"r": 0}, True),
        ("scaled", one_row_to_zero, {}, None),
    ],
)
def test_invertible(form, change, options, invertible, tmp_path):
    report = changed(form, tmp_path, change, **options)
    assert {layer.invertible for layer in report.layers} == {invertible}


def test_what_is_not_finite_is_named(bases, tmp_path, capsys):
    model = adapted("llama", "multiplicative-input-3")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        {key: tensor.double() * 1e150 for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors"
    )
    assert main(["inspect", str(tmp_path)]) == 2
    assert "model.layers.0.mlp.down_proj is broken: its factors multiply to more than" in capsys.readouterr().err
    save_file({key: tensor * 1e20 for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path), "--base", str(bases / "llama")]) == 2
    assert "model.layers.0.mlp.down_proj.weight, or its update, is not finite in torch" in capsys.readouterr().err


def test_sides_that_the_shapes_tell_are_told(tmp_path):
    sides = [layer.side for layer in report_of(small("scaled"), tmp_path / "scaled").layers]
    assert sides == ["output", "input"]
    for form in ("multiplicative", "multiplicative-r0-2"):
        assert {layer.side for layer in report_of(small(form), tmp_path / form).layers} == {"auto"}
    assert {layer.side for layer in report_of(small("scaled", r=0), tmp_path / "r0").layers} == {"auto"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "gpt2"):
        build(kind).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["scaled", "additive", "multiplicative-output-3", "multiplicative", "scaled-both"])
def test_beside_the_base_the_updates_are_those_of_the_dense_weights(kind, form, bases, tmp_path):
    model = adapted(kind, form)
    model.save_pretrained(tmp_path)
    report = inspect_adapter(read_adapter(tmp_path), Checkpoint(bases / kind))
    modules = layers(model.base_model.model)
    assert len(report.layers) == len(modules)
    for layer in report.layers:
        module = modules[layer.module]
        delta = module.delta_matrix("default").double()
        W = module._as_matrix(module.get_base_layer().weight.detach()).double()
        assert layer.side == module.form["default"].side
        weight = layer.weight
        assert weight is not None
        assert weight.name == f"{layer.module}.weight"
        assert weight.relative_update == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-5)
        assert weight.alignment_rows == pytest.approx(alignment_index(delta, W).item(), rel=1e-4)
        assert weight.alignment_columns == pytest.approx(alignment_index(delta.mT, W.mT).item(), rel=1e-4)


def test_blocks_of_a_weight_are_summed(bases, tmp_path, monkeypatch):
    adapted("llama", "multiplicative-output-3").save_pretrained(tmp_path)
    whole = inspect_adapter(read_adapter(tmp_path), Checkpoint(bases / "llama"))
    monkeypatch.setattr("dlor_peft.blocks.BLOCK", 40)
    in_blocks = inspect_adapter(read_adapter(tmp_path), Checkpoint(bases / "llama"))
    for one, other in zip(whole.layers, in_blocks.layers, strict=True):
        assert one.weight is not None
        assert other.weight is not None
        assert one.weight.relative_update == pytest.approx(other.weight.relative_update, rel=1e-5)
        assert one.weight.alignment_rows == pytest.approx(other.weight.alignment_rows, rel=1e-5)


def test_a_tied_embedding_is_read_from_the_tensor_it_shares(tmp_path):
    build("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        build("llama", tie_word_embeddings=True),
        config_of("llama", "scaled", target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True),
    )
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    report = inspect_adapter(read_adapter(tmp_path / "adapter"), Checkpoint(tmp_path / "base"))
    assert {layer.module for layer in report.layers} >= {"lm_head"}
    for layer in report.layers:
        module = layers(model.base_model.model)[layer.module]
        delta = module.delta_matrix("default")
        W = module._as_matrix(module.get_base_layer().weight.detach())
        assert layer.weight is not None
        assert layer.weight.relative_update == pytest.approx((delta.norm() / W.norm()).item(), rel=1e-5)


def test_experts_are_read_from_the_weights_that_make_them_up(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4)).to(torch.bfloat16)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = adapt(base, DLoRConfig(r=2, mode="multiplicative", init_weights=False, **targets), tmp_path)
    adapter = read_adapter(tmp_path / "adapter")
    report = inspect_adapter(adapter, Checkpoint(tmp_path / "base"))
    modules = layers(model.base_model.model)
    assert {layer.experts for layer in report.layers} == {None, 4}
    # one of which has its diagonal on the outputs
    assert {layer.exact_exports for layer in report.layers if layer.experts} == {()}
    assert len(report.layers) == 6
    alone = {layer.module: layer for layer in inspect_adapter(adapter).layers}
    for layer in report.layers:
        module = modules[layer.module]
        delta, W = module.delta_matrix("default"), module._as_matrix(module.get_base_weight())
        assert layer.weight is not None
        assert layer.weight.name.endswith(module.parameter_name)
        assert layer.weight.relative_update == pytest.approx((delta.norm() / W.float().norm()).item(), rel=1e-4)
        pairs = zip(delta, W, strict=True) if layer.experts else [(delta, W)]
        indices = [alignment_index(one, of.float()).item() for one, of in pairs]
        assert layer.weight.alignment_rows == pytest.approx(sum(indices) / len(indices), rel=1e-3)
        assert layer.frobenius_norm == alone[layer.module].frobenius_norm
        assert layer.invertible
        assert layer.condition_bound == alone[layer.module].condition_bound


def test_a_base_that_does_not_match_is_named(bases, tmp_path, capsys):
    adapted("llama").save_pretrained(tmp_path / "adapter")
    build("llama", head_dim=4).save_pretrained(tmp_path / "other")
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "k_proj" in error
    assert "the base needs" in error
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(bases / "gpt2")]) == 2
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("with_base", [False, True])
def test_json_on_stdout_is_all_there_is(with_base, bases, tmp_path, capsys):
    adapted("llama", "multiplicative", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    base = ["--base", str(bases / "llama")] if with_base else []
    assert main(["inspect", str(tmp_path), *base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"adapter", "base", "config", "layers", "saved_in_full", "totals"}
    assert len(found["layers"]) == 2 * len(TARGETS["llama"])
    for layer in found["layers"]:
        assert set(layer) == LAYER_KEYS
        assert set(layer["weight"] or WEIGHT_KEYS) == WEIGHT_KEYS
        assert (layer["weight"] is None) != with_base
    assert found["saved_in_full"] == [{"name": "lm_head.weight", "shape": [40, 16], "bytes": 2560}]
    assert found["totals"]["parameters_saved_in_full"] == 640


def test_the_table_of_a_real_model_fits(tmp_path, capsys):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q_proj", "k_proj")})
            self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(64, 300), "down_proj": nn.Linear(300, 64)})

    model = nn.ModuleDict(
        {"language_model_backbone": nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(12))})}
    )
    config = config_of("llama", "multiplicative-none-2", r=16, target_modules=".*_proj")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")  # pyright: ignore[reportArgumentType]
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 119
    table = [line.split() for line in lines if "_proj" in line and "." in line]
    assert len(table) == 48
    # layer 2 before layer 10
    assert table[8][0] == "layers.2.mlp.down_proj"
    assert table[8][1:5] == ["multiplicative", "input", "2", "16"]
    assert table[8][-2:] == ["LoRA", "DoRA"]


def test_files_are_written_where_they_are_asked_for(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    small("scaled").save_pretrained("adapter")
    assert main(["inspect", "adapter", "--plot", "--json", "report.json"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[-2:] == ["wrote dlor_inspect.png", "wrote report.json"]
    assert (tmp_path / "dlor_inspect.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["layers"] == 2
    assert main(["inspect", "adapter", "--plot", "report.json"]) == 2
    assert "the heat map is a PNG" in capsys.readouterr().err
    assert main(["inspect", "adapter", "--plot", "missing/map.png"]) == 2
    assert "missing/map.png" in capsys.readouterr().err


def test_a_heat_map_needs_the_extra(tmp_path, monkeypatch, capsys):
    small("scaled").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(tmp_path), "--plot", str(tmp_path / "map.png")]) == 2
    assert "install dlor-peft with its extra 'train'" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 0


def test_a_heat_map_beside_the_base(bases, tmp_path):
    pytest.importorskip("matplotlib")
    adapted("llama").save_pretrained(tmp_path)
    report = inspect_adapter(read_adapter(tmp_path), Checkpoint(bases / "llama"))
    assert heatmap_png(report).startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_rows_are_layers_and_columns_are_modules():
    modules = ["model.embed", "model.layers.2.q", "model.layers.10.q", "model.layers.10.mlp.0.up", "lm_head"]
    rows, columns, places = grid(modules)
    assert rows == ["-", "2", "10"]
    assert columns == ["model.embed", "model.layers.*.q", "model.layers.*.mlp.0.up", "lm_head"]
    assert places == [(0, 0), (1, 1), (2, 1), (2, 2), (0, 3)]


def test_common_starts():
    assert without_common_start(["a.b.c", "a.b.d.e"]) == ("a.b.", ["c", "d.e"])
    assert without_common_start(["a.b", "a.b.c"]) == ("a.", ["b", "b.c"])
    assert without_common_start(["m.l.0.q", "m.l.1.q"]) == ("m.", ["l.0.q", "l.1.q"])
    assert without_common_start(["0.q", "1.q"]) == ("", ["0.q", "1.q"])
