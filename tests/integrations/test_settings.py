"""The names that hosts give to the fields of DLoRConfig."""

import dataclasses
import re

import pytest
from peft import PeftConfig

from dlor_peft import DLoRConfig
from dlor_peft.integrations.settings import FIELDS, read


def test_every_field_of_the_user_has_a_name():
    assert {"dlor_r", "dlor_mode", "dlor_dropout", "dlor_target_modules", "dlor_rank_pattern"} <= FIELDS.keys()
    theirs = {field.name for field in dataclasses.fields(PeftConfig)}
    ours = {field.name for field in dataclasses.fields(DLoRConfig)} - theirs - {"dlor_version"}
    assert {field.name for field in FIELDS.values()} == ours
    assert all(field.metadata["help"] for field in FIELDS.values())


def test_reads_what_is_given():
    given = {"dlor_r": 4, "dlor_dropout": 0.1, "dlor_mode": None, "lora_r": 8, "seed": 1}
    assert read(given, "here") == {"r": 4, "dlor_dropout": 0.1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dlor_rank_patern": {}},
            "here: 'dlor_rank_patern' is no setting of DLoR. Did you mean 'dlor_rank_pattern'?",
        ),
        ({"dlor_xyz": 1}, "here: 'dlor_xyz' is no setting of DLoR. Known: dlor_r, dlor_mode,"),
        ({"dlor_version": "1"}, "here: 'dlor_version' is no setting of DLoR."),
        ({"dlor_target_modules": ["q"]}, "here: 'dlor_target_modules' is set by --targets here."),
    ],
)
def test_refuses_other_names(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(given, "here", {"target_modules": "--targets"})
