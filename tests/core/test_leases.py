"""What placements share: leases are counted, and what comes next is brought ahead of it."""

import threading

import pytest
import torch

from arctic_plugins.frozen import FetchedHandle, Prefetch

CPU = torch.device("cpu")


class Noted(FetchedHandle[str]):
    """A weight that notes what is asked of it."""

    def __init__(self, name, prefetch, notes):
        super().__init__(name, prefetch)
        self.notes, self.broken = notes, False
        prefetch.add(self)

    def fetch(self, device, at):
        self.notes.append(f"fetch {self.name} at {at.name}")
        return self.name

    def buffers(self, fetched, device):
        assert fetched == self.name
        if self.broken:
            raise OSError("gone")
        return {"": torch.zeros(1)}

    def release(self, fetched):
        self.notes.append(f"release {fetched}")

    def drop(self, fetched):
        self.notes.append(f"drop {fetched}")

    def export(self):
        return {}


@pytest.fixture
def house():
    """A function that gives weights a, b, c, d of a placement that brings so many ahead, and their notes."""

    def make(ahead):
        prefetch, notes = Prefetch(ahead), []
        return {name: Noted(name, prefetch, notes) for name in "abcd"}, notes

    return make


def use(weights, order):
    for name in order:
        with weights[name].lease(CPU):
            pass


def test_leases_that_overlap_fetch_once(house):
    weights, notes = house(0)
    a = weights["a"]
    with a.lease(CPU), a.lease(CPU):
        with a.lease(CPU):
            assert a.leases == 3
        assert notes == ["fetch a at a"]
    assert (a.leases, notes) == (0, ["fetch a at a", "release a"])


def test_what_came_next_is_brought_ahead(house):
    weights, notes = house(2)
    use(weights, "abcd" * 2)
    notes.clear()
    use(weights, "ab")
    assert notes == ["fetch c at a", "release a", "fetch d at b", "release b"], "a and b were on their way before"
    assert [weight.name for weight in weights["a"].prefetch.pending] == ["c", "d"]
    notes.clear()
    use(weights, "b")
    assert notes[:3] == ["drop c", "drop d", "fetch b at b"], "nothing is known to follow, and room is made first"


def test_what_is_leased_is_not_brought_ahead(house):
    weights, notes = house(1)
    use(weights, "abab")
    with weights["a"].lease(CPU):
        notes.clear()
        use(weights, "b")
    assert "fetch a at b" not in notes
    assert notes[0] == "release b"


def test_a_weight_that_is_held_again_takes_the_place_of_the_first(house):
    weights, _ = house(1)
    use(weights, "abab")
    new = Noted("b", weights["b"].prefetch, again := [])
    use(weights, "a")
    assert again == ["fetch b at a"]
    with new.lease(CPU):
        assert again == ["fetch b at a"]


def test_a_lease_that_fails_is_over(house):
    weights, notes = house(0)
    weights["a"].broken = True
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            use(weights, "a")
    assert weights["a"].leases == 0
    assert notes == ["fetch a at a", "release a"] * 2


def test_threads_count_together(house):
    weights, notes = house(1)
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(50):
            use(weights, "abcd")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(weight.leases == 0 for weight in weights.values())
    begun = sum(note.startswith("fetch") for note in notes)
    ended = sum(note.startswith(("release", "drop")) for note in notes)
    assert begun == ended + len(weights["a"].prefetch.pending)
