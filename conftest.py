"""The order of the whole suite: what takes long begins first, so that two workers end together."""


def pytest_collection_modifyitems(items):
    """Files that start the engine, then files with other slow tests, then the rest, each in the order of collection."""
    ranks = {}
    for item in items:
        rank = 0 if item.get_closest_marker("vllm") else 1 if item.get_closest_marker("slow") else 2
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])
