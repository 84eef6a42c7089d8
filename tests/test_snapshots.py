"""What is kept of conversations, and what makes room."""

from dataclasses import dataclass

from flashmoe.generate.conversations import Conversations


@dataclass
class Held:
    """A native state: 1000 bytes of its own, and what it shares."""

    position: int
    shared: tuple[int, int] = (0, 0)
    logits: None = None

    @property
    def nbytes(self) -> int:
        return 1000 + self.shared[1]

    def fork(self) -> "Held":
        return Held(self.position, self.shared)


def _keep(kept: Conversations, ids: list[int], *, shared=(0, 0), **options) -> None:
    kept.keep(Held(len(ids), shared), ids, **options)  # type: ignore[arg-type]


def test_the_longest_beginning_is_found() -> None:
    kept = Conversations(100_000)
    assert kept.longest([1, 2, 3]) is None
    _keep(kept, [1, 2])
    _keep(kept, [1, 2, 3, 4])
    _keep(kept, [1, 9, 3, 4, 5])
    assert kept.longest([1, 2, 3, 4, 5]).position == 4
    assert kept.longest([1, 2, 3, 5]).position == 2
    assert kept.longest([1, 3]) is None


def test_one_sequence_is_kept_once() -> None:
    kept = Conversations(100_000)
    for _ in range(2):
        _keep(kept, [1, 2, 3])
    assert len(kept) == 1
    assert kept.longest([1, 2, 3]).position == 3


def test_the_least_recently_used_make_room() -> None:
    kept = Conversations(3 * 1010)
    for first in (1, 2, 3):
        _keep(kept, [first])
    kept.longest([1, 5])
    _keep(kept, [4])
    assert [kept.longest([first, 5]) is not None for first in (1, 2, 3, 4)] == [
        True,
        False,
        True,
        True,
    ]
    assert kept.nbytes <= kept.budget


def test_shared_keys_and_values_are_counted_once_and_as_long_as_they_are_held() -> None:
    kept = Conversations(100_000)
    _keep(kept, [1], shared=(77, 5000))
    _keep(kept, [1, 2], shared=(77, 5000))
    _keep(kept, [3], shared=(78, 300))
    assert kept.nbytes == 3 * 1000 + 5000 + 300 + 4 * 4
    kept.budget = 8000
    _keep(kept, [1, 2, 3], shared=(77, 5000))
    assert kept.nbytes <= 8000
    assert kept.longest([1, 2, 3, 4]).position == 3
    assert kept.longest([3, 4]).position == 1


def test_what_fits_no_budget_is_not_kept() -> None:
    for budget in (0, 900):
        kept = Conversations(budget)
        _keep(kept, [1])
        assert (len(kept), kept.nbytes) == (0, 0)
    kept = Conversations(100_000)
    kept.keep(Held(0), [1, 2])  # type: ignore[arg-type]
    assert len(kept) == 0


def test_of_one_conversation_the_latest_stay_and_the_places_it_comes_back_to() -> None:
    kept = Conversations(1_000_000)
    ids = list(range(1, 40))
    for length in range(2, 21, 2):
        _keep(kept, ids[:length], places={4, 10})
    found = [n for n in range(1, 21) if (s := kept.longest(ids[: n + 1])) and s.position == n]
    assert found == [4, 10, 14, 16, 18, 20]
    _keep(kept, [1, 2, 99])  # another that parts from it lets none of it go
    assert kept.longest(ids).position == 20


def test_only_tokens_that_were_computed_count() -> None:
    kept = Conversations(100_000)
    kept.keep(Held(2), [1, 2, 3])  # type: ignore[arg-type]
    assert kept.longest([1, 2, 9]).position == 2


def test_all_are_let_go() -> None:
    kept = Conversations(100_000)
    _keep(kept, [1])
    assert kept.nbytes > 0
    kept.clear()
    assert kept.nbytes == 0
