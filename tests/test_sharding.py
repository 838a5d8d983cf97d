import pytest
import torch
import torch.distributed.fsdp
from torch import nn
from torch.distributed.tensor import Shard

from dlor_peft.sharding import adapters_sharded_by_rows, shard_placement


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 64, 8), Shard(1)),
        ((2, 6, 8), Shard(2)),
        ((1, 8, 64), Shard(2)),
        ((1, 63, 8), Shard(2)),
        ((1, 64), Shard(1)),
        # nothing is better than the first dimension
        ((1, 63, 7), None),
        ((1, 1), None),
        ((1, 0, 0), None),
        # long enough
        ((4, 64, 8), None),
        ((63, 64), None),
    ],
)
def test_what_is_shorter_than_the_devices_is_split_along_its_rows(shape, expected):
    assert shard_placement(4)(nn.Parameter(torch.empty(shape))) == expected


def test_fully_shard_is_itself_again_after_an_error():
    original = torch.distributed.fsdp.fully_shard
    changed = []

    def fail():
        with adapters_sharded_by_rows():
            changed.append(torch.distributed.fsdp.fully_shard is not original)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert changed == [True]
    assert torch.distributed.fsdp.fully_shard is original
