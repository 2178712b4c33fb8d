"""The order of the whole suite: what takes long begins first, so that two workers end together."""


def pytest_collection_modifyitems(items):
    """The demo, files that start the engine, files with other slow tests, and the rest, each in the order of
    collection.
    """
    ranks = {}
    for item in items:
        rank = (
            -1
            if item.path.name == "test_wheels.py"
            else 0
            if item.get_closest_marker("vllm")
            else 1
            if item.get_closest_marker("slow")
            else 2
        )
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])
