import pytest
import torch
from quantised_models import save_llama


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Whether the layers have biases -> the folder of an unquantised Llama."""
    return {biases: save_llama(tmp_path_factory.mktemp("llama"), biases) for biases in (True, False)}
