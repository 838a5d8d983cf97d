"""DLOR is a genuine PEFT method after `import dlor_peft`, in any process, however often it is imported."""

import ast
import copy
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from peft import PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType
from tiny_models import adapted

import dlor_peft
from dlor_peft import DLoRConfig, DLoRModel, register

ROOT = Path(__file__).parents[1]


def python(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with `code` on standard input, in the repository root."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)


def run(code: str) -> str:
    done = python("-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_member_is_genuine():
    member = PeftType("DLOR")
    assert member is PeftType["DLOR"] is PeftType.DLOR
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert (member.name, member.value) == ("DLOR", "DLOR")
    assert member == "DLOR"
    assert list(PeftType).count(member) == 1
    assert member in PeftType
    assert PeftType.__members__["DLOR"] is member
    assert list(PeftType)[-1] is member
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))


def test_the_member_survives_copies():
    member = PeftType.DLOR
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is member
    assert copy.deepcopy({"a": [member]})["a"][0] is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "DLOR"}
    assert hash(member) == hash(PeftType("DLOR"))
    assert {member: 1}[PeftType.DLOR] == 1
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "DLOR")
    assert str(member) == str(PeftType.LORA).replace("LORA", "DLOR")


def test_the_other_members_are_untouched():
    assert PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError, match="not a valid PeftType"):
        PeftType("DLORA")


def test_peft_maps_to_our_classes():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DLOR] is DLoRConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DLOR] is DLoRModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.DLOR] == "dlor_"


def test_peft_makes_our_config_from_plain_values():
    assert type(get_peft_config({"peft_type": "DLOR", "r": 2})) is DLoRConfig
    assert PeftConfig.from_peft_type(peft_type="DLOR", r=3) == DLoRConfig(r=3)


def test_registering_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING)
    register()
    register()
    assert before == (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_PREFIX_MAPPING))


def test_the_config_of_a_model_can_be_copied():
    config = copy.deepcopy(adapted("llama").peft_config["default"])
    assert config.peft_type is PeftType.DLOR
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_public_names_exist():
    for name in dlor_peft.__all__:
        assert getattr(dlor_peft, name) is not None
    with pytest.raises(AttributeError, match="DLoRConfigg"):
        dlor_peft.DLoRConfigg  # noqa: B018


@pytest.mark.parametrize(
    "argv", [[""], [], ["."], ["/"], ["-c"], ["-"], ["/usr/bin/ipython"], ["/tmp/dlor.py"], ["-m"]], ids=str
)
def test_any_process_but_the_command_line_registers(argv, monkeypatch):
    """The interactive interpreter and `python < file` have an empty sys.argv[0], embedded ones may have none."""
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "train", "dlor_peft.py"])
    assert not dlor_peft._is_command_line()


def test_reloads_and_a_fresh_import_map_to_the_new_classes():
    run(
        """
        import importlib, sys, torch, peft, dlor_peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING as tuners
        count = len(list(peft.PeftType))
        old = dlor_peft.DLoRConfig
        importlib.reload(dlor_peft)
        assert configs["DLOR"] is dlor_peft.DLoRConfig is old
        parts = "parts quantised base activation linear conv embedding parameter attention".split()
        parts = ["layers." + part for part in parts]
        for name in ["maths", "card", "fields", "config", "kernels", "form", *parts, "layers", "combine", "hotswap",
                     "mixing", "model", "registration"]:
            importlib.reload(importlib.import_module("dlor_peft." + name))
        importlib.reload(dlor_peft)
        assert dlor_peft.DLoRConfig is not old
        assert configs["DLOR"] is dlor_peft.DLoRConfig and tuners["DLOR"] is dlor_peft.DLoRModel
        assert len(list(peft.PeftType)) == count
        net = torch.nn.Sequential(torch.nn.Linear(3, 4))
        model = peft.get_peft_model(net, dlor_peft.DLoRConfig(target_modules=["0"]))
        assert model(torch.ones(2, 3)).shape == (2, 4)

        old = dlor_peft.DLoRConfig
        for name in [name for name in sys.modules if name.partition(".")[0] == "dlor_peft"]:
            del sys.modules[name]
        import dlor_peft
        assert configs["DLOR"] is dlor_peft.DLoRConfig is not old
        assert tuners["DLOR"] is dlor_peft.DLoRModel
        assert len(list(peft.PeftType)) == count
        """
    )


def test_functions_that_were_imported_before_serve_dlor_too():
    run(
        """
        import torch, peft
        from peft.helpers import rescale_adapter_scale
        from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
        import dlor_peft, tempfile

        def make(r):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(3, 4))
            config = dlor_peft.DLoRConfig(r=r, target_modules=["0"], init_weights=False)
            return peft.get_peft_model(net, config)

        model, other = make(2), make(3)
        prepare_model_for_compiled_hotswap(model, target_rank=3, config=model.peft_config)
        with tempfile.TemporaryDirectory() as path:
            other.save_pretrained(path)
            hotswap_adapter(model, path, "default", torch_device="cpu")
        x = torch.ones(2, 3)
        assert torch.equal(model(x), other(x))
        with rescale_adapter_scale(model, 0):
            assert torch.equal(model(x), model.base_model.model[0].base_layer(x))
        assert torch.equal(model(x), other(x))
        """
    )


def test_a_peft_that_renamed_what_is_patched_still_has_the_method():
    code = """
        import warnings
        from peft.utils import hotswap
        del hotswap._pad_lora_weights
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import dlor_peft
        print([str(warning.message) for warning in caught if "dlor_peft" in str(warning.message)])
        from peft import get_peft_model
        from torch import nn
        get_peft_model(nn.Sequential(nn.Linear(3, 4)), dlor_peft.DLoRConfig(target_modules=["0"]))
    """
    (warning,) = ast.literal_eval(run(code))
    assert "has no peft.utils.hotswap._pad_lora_weights" in warning


def test_a_foreign_method_of_this_name_is_refused_by_name():
    output = run(
        """
        import sys, types, peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
        member = str.__new__(peft.PeftType, "DLOR")
        member._name_ = member._value_ = "DLOR"
        peft.PeftType._member_map_["DLOR"] = peft.PeftType._value2member_map_["DLOR"] = member
        foreign = type("DLorConfig", (), {"__module__": "dlor_peft_rival.tuner"})
        configs[member] = foreign
        try:
            import dlor_peft
        except ImportError as error:
            print(error)
        assert configs[member] is foreign
        """
    )
    assert "'DLOR' is already provided by `dlor_peft_rival.tuner`" in output
    assert "uninstall dlor-peft" in output


def test_the_import_from_standard_input_registers_and_loads_no_training_library():
    code = """
import sys, peft
before = set(sys.modules)
import dlor_peft
own = {"dlor_peft.optimiser", "dlor_peft.initialisation", "dlor_peft.cap"} & set(sys.modules)
for name in dlor_peft.__all__:
    getattr(dlor_peft, name)
heavy = {"trl", "matplotlib", "pydantic", "sklearn", "rich", "triton", "datasets", "scipy", "pandas", "yaml"}
print(peft.PeftType.DLOR, sorted({name.partition(".")[0] for name in set(sys.modules) - before} & heavy), own)
"""
    done = python(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("DLOR [] set()")


def test_without_the_import_loading_names_the_missing_method(tmp_path):
    adapted("llama").save_pretrained(tmp_path)
    done = python("-c", f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})")
    assert done.returncode == 1
    assert "KeyError: 'DLOR'" in done.stderr


def test_the_command_line_does_not_load_torch():
    """The `dlor` command parses its arguments first: the guard in the package must recognise it and nothing else."""
    output = run(
        """
        import sys, sysconfig, pathlib
        sys.argv = [str(pathlib.Path(sysconfig.get_path("scripts"), "dlor")), "--help"]
        import dlor_peft
        print("torch" in sys.modules, "peft" in sys.modules)
        """
    )
    assert output.split() == ["False", "False"]
