import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    # first, so that no process is left alone with one in the end
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
