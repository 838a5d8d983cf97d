"""A damaged adapter, base or disk is one line of error and exit code 2: nothing is left behind, or read in part."""

import contextlib
import io
import json
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_models import adapted, build

from dlor_peft.cli import main

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMS = {
    "scaled-both": {"modules_to_save": ["lm_head"], "rank_pattern": {"up_proj": 2}},
    "multiplicative-output-3": {"depth_pattern": {"q_proj": 1}},
    "scaled": {"bias": "dlor_only", "task_type": None},
    "additive": {"trainable_token_indices": [1, 5], "mode_pattern": {"q_proj": "multiplicative"}},
}

fuzz = settings(
    deadline=None, max_examples=40, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, and adapters by the name of their form."""
    folder = tmp_path_factory.mktemp("saved")
    build("llama").save_pretrained(folder / "base")
    for form, options in FORMS.items():
        adapted("llama", form, **{"task_type": "CAUSAL_LM", **options}).save_pretrained(folder / form)
    return folder


def run(*words) -> tuple[int, str]:
    """The exit code and the message, which is one line and the last."""
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error), warnings.catch_warnings():
        # of unknown fields, of lost updates
        warnings.simplefilter("ignore")
        code = main([str(word) for word in words])
    lines = error.getvalue().splitlines()
    messages = [line for line in lines if line.startswith("dlor: error:")]
    assert "Traceback" not in error.getvalue()
    assert code in (0, 2)
    assert messages == (lines[-1:] if code else [])
    return code, messages[0] if messages else ""


def merge(saved, adapter, out) -> tuple[int, str]:
    return run("merge", "--base", saved / "base", "--adapter", adapter, "--out", out)


def merged_by_hand(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What the two files of an adapter make of a base: every tensor in them has its place, or KeyError."""
    config = json.loads((adapter / CONFIG).read_text())
    tensors = load_file(base / "model.safetensors")
    factors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(adapter / WEIGHTS).items():
        name = key.removeprefix("base_model.model.").replace(".base_layer", "")
        module, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor == "trainable_tokens_delta":
            name = f"{module.removesuffix('.token_adapter')}.weight"
            (indices,) = [config["trainable_token_indices"]]
            tensors[name] = tensors[name].index_copy(0, torch.tensor(indices), tensor)
        elif factor.startswith("dlor_"):
            factors.setdefault(f"{module}.weight", {})[factor] = tensor.double()
        else:
            assert tensor.shape == tensors[name].shape
            tensors[name] = tensor.to(tensors[name].dtype)
    for name, stored in factors.items():
        W = tensors[name].double()
        patterns = {key: config.get(f"{key}_pattern") or {} for key in ("mode", "side")}
        mode, side = (
            next((value for part, value in patterns[key].items() if part in name), config[key]) for key in patterns
        )
        tensors[name] = adapted_by_hand(W, stored, mode, side).to(tensors[name].dtype)
    return tensors


def adapted_by_hand(W, stored, mode, side):
    O, I = W.shape
    if side == "auto":
        side = "output" if O < I else "input"
    q = stored.get("dlor_diag", torch.zeros(1, 1, dtype=W.dtype))
    UV = stored["dlor_U"] @ stored["dlor_V"].mT if "dlor_U" in stored else torch.zeros(len(q), 1, 1, dtype=W.dtype)
    if mode == "additive":
        return W + torch.eye(O, I, dtype=W.dtype) * torch.nn.functional.pad(q[0], (0, I - q.shape[1])) + UV[0]
    if mode == "scaled":
        left, right = (q, stored.get("dlor_diag_in", q)) if side == "both" else (q * (side == "output"), q * 0)
        if side == "input":
            left, right = torch.zeros(1, 1, dtype=W.dtype), q
        right = right if right.shape[1] in (1, I) else torch.zeros(1, 1, dtype=W.dtype)
        return (1 + left[0])[:, None] * W * (1 + right[0]) + UV[0]
    for k in range(len(q)) if side == "output" else reversed(range(len(q))):
        factor = torch.diag((1 + q[k]).expand(O if side == "output" else I)) + UV[k]
        W = factor @ W if side == "output" else W @ factor
    return W


def check(saved, adapter, tmp_path) -> None:
    """Inspecting and merging it succeed or fail in order; what is merged is all that the files hold."""
    out = tmp_path / "out"
    inspected, _ = run("inspect", adapter)
    with_base = inspected or run("inspect", adapter, "--base", saved / "base", "--json")[0]
    code, _ = merge(saved, adapter, out)
    beside = {path.name for path in tmp_path.iterdir()} - {adapter.name}
    # a merge may be refused for more than an inspection: weights that would not be finite
    assert inspected <= with_base
    if code:
        assert not beside
        return
    assert not inspected
    assert beside == {"out"}
    expected = merged_by_hand(saved / "base", adapter)
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        scale = expected[name].double().abs().max().clamp_min(1)
        assert tensor.shape == expected[name].shape
        assert (tensor.double() - expected[name].double()).abs().max() <= 1e-5 * scale, name
    shutil.rmtree(out)


def copied(saved, form, tmp_path) -> Path:
    # of an example before this one
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    return shutil.copytree(saved / form, tmp_path / "adapter")


forms = st.sampled_from(list(FORMS))


@pytest.mark.parametrize("form", FORMS)
def test_the_undamaged_ones_merge_to_what_is_expected(form, saved, tmp_path):
    adapter = copied(saved, form, tmp_path)
    assert run("inspect", adapter)[0] == 0
    check(saved, adapter, tmp_path)
    assert merge(saved, adapter, tmp_path / "out")[0] == 0


@given(st.data(), forms)
@fuzz
def test_changed_bytes(saved, tmp_path, data, form):
    adapter = copied(saved, form, tmp_path)
    content = bytearray((adapter / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 7) | st.integers(8, header) | st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["flip", "truncate", "insert", "delete"]))
        some = data.draw(st.binary(min_size=1, max_size=9))
        if kind == "flip" and at < len(content):
            content[at] ^= some[0] or 1
        elif kind == "truncate":
            del content[at:]
        elif kind == "insert":
            content[at:at] = some
        else:
            del content[at : at + len(some)]
    (adapter / WEIGHTS).write_bytes(content)
    check(saved, adapter, tmp_path)


names = st.sampled_from(
    ["base_model.model.model.layers.0.self_attn.q_proj.dlor_U.weight", "dlor_U.weight", ".dlor_U.weight", "",
     "lm_head.weight", "base_model.model.lm_head.weight", "base_model.model.model.norm.weight", "model.layers.0",
     "base_model.model.model.layers.0.self_attn.o_proj.dlor_diag.weight", "__metadata__",
     "base_model.model.base_model.model.model.norm.weight", "base_model.model.model.layers.1.mlp.dlor_U.weight"]
)  # fmt: skip
KINDS = ["shape", "reversed", "dtype", "offsets", "rename", "delete", "swap", "junk"]
DTYPES = ["F16", "BF16", "F64", "I32", "U32", "BOOL", "F8_E4M3", "F8_E8M0", "C64", "F4", "f32", ""]
numbers = st.integers(-2, 70) | st.sampled_from([2**31, 2**63 - 1, 2**64, 2**70, -1])


@given(st.data(), forms)
@fuzz
def test_changed_headers(saved, tmp_path, data, form):
    adapter = copied(saved, form, tmp_path)
    content = (adapter / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 2))):
        key = data.draw(st.sampled_from(sorted(header)))
        kind = data.draw(
            st.sampled_from(["shape", "reversed", "dtype", "offsets", "rename", "delete", "swap", "junk"])
        )
        entry = header.get(key)
        if kind == "delete":
            del header[key]
        elif kind == "rename":
            header[data.draw(names | st.text(max_size=20))] = header.pop(key)
        elif kind == "junk":
            header[key] = data.draw(json_values)
        elif isinstance(entry, dict) and "shape" in entry:
            if kind == "shape":
                entry["shape"] = data.draw(st.lists(numbers, max_size=5))
            elif kind == "reversed":
                entry["shape"] = [1, *entry["shape"]] if data.draw(st.booleans()) else entry["shape"][::-1]
            elif kind == "dtype":
                entry["dtype"] = data.draw(
                    st.sampled_from(["F16", "BF16", "F64", "I32", "BOOL", "F8_E4M3", "C64", "F4"])
                )
            elif kind == "offsets":
                entry["data_offsets"] = data.draw(st.lists(numbers, min_size=1, max_size=3))
            else:
                other = data.draw(st.sampled_from(sorted(header)))
                header[key], header[other] = header[other], header[key]
    text = json.dumps(header).encode()
    (adapter / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    check(saved, adapter, tmp_path)


words = st.sampled_from(
    ["additive", "scaled", "multiplicative", "input", "output", "both", "auto", "none", "scalar", "vector", "all",
     "dlor_only", "all-linear", "q_proj", "(", "(a+)+$", "*", "SEQ_CLS", "CAUSAL_LM", "TOKEN_CLS", "LORA",
     "FEATURE_EXTRACTION", "\ud800", "\x1b[31m", "a\nb", "../..", "layers", "up_proj.weight", "lm_head",
     "embed_tokens"]
)  # fmt: skip
scalars = st.none() | st.booleans() | numbers | st.floats() | words | st.text(max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=5), inner, max_size=3),
)


@given(st.data(), forms)
@settings(fuzz, max_examples=60)
def test_changed_configurations(saved, tmp_path, data, form):
    adapter = copied(saved, form, tmp_path)
    fields = json.loads((adapter / CONFIG).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(fields)) | st.text(max_size=5))
        if data.draw(st.integers(0, 3)) == 0:
            fields.pop(name, None)
        else:
            fields[name] = data.draw(json_values)
    (adapter / CONFIG).write_text(json.dumps(fields))
    check(saved, adapter, tmp_path)


@pytest.mark.parametrize("r", [10**6, 10**9, 2**40, 2**62, 2**70])
def test_ranks_that_no_memory_holds(r, saved, tmp_path):
    adapter = copied(saved, "scaled", tmp_path)
    fields = json.loads((adapter / CONFIG).read_text())
    stored, absent = fields["target_modules"], ["o_proj"]
    changes = {"r": r, "rank_pattern": dict.fromkeys(stored, 3), "target_modules": stored + absent}
    (adapter / CONFIG).write_text(json.dumps({**fields, **changes}))
    check(saved, adapter, tmp_path)
    assert merge(saved, adapter, tmp_path / "out")[0] == 2


def test_each_field_missing(saved, tmp_path):
    for name in json.loads((saved / "multiplicative-output-3" / CONFIG).read_text()):
        adapter = copied(saved, "multiplicative-output-3", tmp_path)
        fields = json.loads((adapter / CONFIG).read_text())
        del fields[name]
        (adapter / CONFIG).write_text(json.dumps(fields))
        check(saved, adapter, tmp_path)
        if name in ("mode", "side", "diagonal", "r", "depth"):
            assert f"it has no {name}" in run("inspect", adapter)[1]


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b'"DLOR"', b"{}", b'{"peft_type": "DLOR"}', b'{"peft_type": ["DLOR"]}', b"[" * 100_000,
     b'{"peft_type": ' * 100_000, b"\xff\xfe\x00", b'{"peft_type": "DLOR"', b"1" * 10_000, b"NaN"]
)  # fmt: skip
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_other_files(content, name, saved, tmp_path):
    adapter = copied(saved, "scaled", tmp_path)
    (adapter / name).write_bytes(content)
    check(saved, adapter, tmp_path)
    assert run("inspect", adapter)[0] == 2


@pytest.mark.parametrize("value", [3, True, ["base"], {"base_model_class": []}, {"base_model_class": 3}, "\ud800", ""])
@pytest.mark.parametrize("name", ["base_model_name_or_path", "auto_mapping", "revision", "task_type", "peft_version"])
def test_what_peft_takes_down(name, value, saved, tmp_path):
    adapter = copied(saved, "scaled", tmp_path)
    fields = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**fields, "base_model_name_or_path": str(saved / "base"), name: value}))
    check(saved, adapter, tmp_path)
    run("merge", "--adapter", adapter, "--out", tmp_path / "out")


@pytest.mark.parametrize("indices", [[1, 40], [1, 2**31], [1, 2**70], [1], [], None, {"embed_tokens": [1, 5, 6]}])
def test_tokens_that_there_are_not(indices, saved, tmp_path):
    adapter = copied(saved, "additive", tmp_path)
    fields = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps({**fields, "trainable_token_indices": indices}))
    check(saved, adapter, tmp_path)
    assert merge(saved, adapter, tmp_path / "out")[0] == 2


ALLOWED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES_OF_TORCH = {d for d in vars(torch).values() if isinstance(d, torch.dtype) and not d.is_complex}


@pytest.mark.parametrize("dtype", sorted(DTYPES_OF_TORCH, key=str), ids=str)
def test_every_dtype(dtype, saved, tmp_path):
    adapter = copied(saved, "scaled", tmp_path)
    try:
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(adapter / WEIGHTS).items()}
        save_file(tensors, adapter / WEIGHTS)
    except (KeyError, RuntimeError, SafetensorError) as error:
        assert dtype not in ALLOWED
        pytest.skip(f"PyTorch does not convert to {dtype}, or safetensors does not write it: {error}")
    check(saved, adapter, tmp_path)
    assert (run("inspect", adapter)[0] == 0) == (dtype in ALLOWED)


def remove(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [remove, folder, loop, dangling])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file(damage, name, saved, tmp_path):
    adapter = copied(saved, "scaled", tmp_path)
    damage(adapter / name)
    check(saved, adapter, tmp_path)
    code, message = run("inspect", adapter)
    assert code == 2
    assert f"has no {name}" in message


def test_an_adapter_that_is_no_folder(saved, tmp_path):
    for path in (tmp_path / "file", tmp_path / "loop", tmp_path / "missing"):
        if path.name == "file":
            path.write_text("x")
        elif path.name == "loop":
            path.symlink_to(path.name)
        code, message = run("inspect", path)
        assert code == 2
        assert f"there is no folder {path}" in message


def test_a_pickle_is_not_read(saved, tmp_path):
    adapter = copied(saved, "scaled", tmp_path)
    (adapter / WEIGHTS).unlink()
    # unpickling it would raise
    (adapter / "adapter_model.bin").write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit(7)'\ntR.")
    check(saved, adapter, tmp_path)
    assert "Pickled weights are never read" in run("inspect", adapter)[1]
