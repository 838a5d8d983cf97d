import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New memory holds NaN, so that what is left unwritten shows; all else that is random starts alike."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
