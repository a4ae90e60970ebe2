"""The tree finds the longest common beginning, per token, among exactly those that are in it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import TokenIds
from actors.prefix_tree import PrefixTree, common_prefix

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)
steps = st.lists(st.tuples(st.integers(0, 5), st.none() | tokens), max_size=30)


def ids(tokens: list[int]) -> TokenIds:
    return np.asarray(tokens, dtype=np.int32)


@settings(max_examples=200, deadline=None)
@given(steps, tokens)
def test_match_is_the_longest_of_all_sequences(
    changes: list[tuple[int, list[int] | None]], asked: list[int]
) -> None:
    """Whatever was entered, moved and taken out before."""
    tree, known = PrefixTree(), dict[int, list[int]]()
    for sequence_id, entered in changes:
        if entered is None:
            tree.remove(sequence_id)
            known.pop(sequence_id, None)
        else:
            tree.insert(sequence_id, ids(entered))
            known[sequence_id] = entered

        matched, found = tree.match(ids(asked))

        best = max([common_prefix(ids(each), ids(asked)) for each in known.values()], default=0)
        assert matched == best
        assert len(tree) == len(known)
        if best:
            assert found is not None
            assert known[found][:best] == asked[:best]
    for sequence_id, own in known.items():
        covered = {
            other
            for other, theirs in known.items()
            if other != sequence_id and own[: len(theirs)] == theirs
        }
        assert set(tree.covered_by(sequence_id)) == covered
        assert tree.is_covered(sequence_id) == any(
            theirs[: len(own)] == own for other, theirs in known.items() if other != sequence_id
        )


def test_taking_all_out_leaves_an_empty_tree() -> None:
    """Edges that were cut are joined again: nothing of what is gone stays."""
    tree = PrefixTree()
    tree.insert(1, ids([1, 2, 3, 4]))
    tree.insert(2, ids([1, 2, 5]))
    tree.insert(3, ids([1, 2]))
    for sequence_id in (3, 1, 2):
        tree.remove(sequence_id)

    assert tree.match(ids([1, 2, 3])) == (0, None)
    assert not tree._root.children
