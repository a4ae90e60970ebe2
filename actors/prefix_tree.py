"""Which sequence begins like a prompt: a radix tree over token ids. No tensors, no pages.

An edge holds the tokens between two places where sequences part or end. Matching is per
token: it may end inside an edge, for any prefix of a sequence can be shared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from actors.messages import TokenIds


@dataclass(eq=False)
class _Node:
    """A place in the tree, and the edge that leads to it."""

    tokens: TokenIds
    parent: "_Node | None"
    children: dict[int, "_Node"] = field(default_factory=dict)  # by an edge's first token
    sequence_ids: dict[int, None] = field(default_factory=dict)  # that end here, in order


class PrefixTree:
    """Sequences of one tenant by their tokens."""

    def __init__(self) -> None:
        """Begin empty."""
        self._root = _Node(np.empty(0, dtype=np.int32), None)
        self._ends: dict[int, _Node] = {}

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def match(self, tokens: TokenIds) -> tuple[int, int | None]:
        """Return the longest prefix that a sequence has too, in tokens, and such a sequence."""
        node, matched = self._root, 0
        while matched < len(tokens):
            child = node.children.get(int(tokens[matched]))
            if child is None:
                break
            common = common_prefix(child.tokens, tokens[matched:])
            node, matched = child, matched + common
            if common < len(child.tokens):
                break
        return matched, _any_sequence(node) if matched else None

    def insert(self, sequence_id: int, tokens: TokenIds) -> None:
        """Enter a sequence, or move one that is there, to where its tokens lead."""
        self.remove(sequence_id)
        node, done = self._root, 0
        while done < len(tokens):
            child = node.children.get(int(tokens[done]))
            if child is None:
                child = _Node(tokens[done:].copy(), node)
                node.children[int(tokens[done])] = child
            common = common_prefix(child.tokens, tokens[done:])
            if common < len(child.tokens):
                child = _split(child, common)
            node, done = child, done + common
        node.sequence_ids[sequence_id] = None
        self._ends[sequence_id] = node

    def remove(self, sequence_id: int) -> None:
        """Take a sequence out; one that is not there is no error."""
        node = self._ends.pop(sequence_id, None)
        if node is None:
            return
        del node.sequence_ids[sequence_id]
        while node.parent is not None and not node.sequence_ids and not node.children:
            del node.parent.children[int(node.tokens[0])]
            node = node.parent
        if node.parent is not None and not node.sequence_ids and len(node.children) == 1:
            self._join(node)

    def is_covered(self, sequence_id: int) -> bool:
        """Return whether another sequence begins with all tokens of this one."""
        node = self._ends[sequence_id]
        return bool(node.children) or len(node.sequence_ids) > 1

    def covered_by(self, sequence_id: int) -> Iterator[int]:
        """Yield the other sequences that this one begins with."""
        node: _Node | None = self._ends[sequence_id]
        while node is not None:
            yield from (other for other in node.sequence_ids if other != sequence_id)
            node = node.parent

    def _join(self, node: _Node) -> None:
        """Make one edge of the edge to a node where nothing ends or parts, and the next."""
        assert node.parent is not None
        (child,) = node.children.values()
        child.tokens = np.concatenate([node.tokens, child.tokens])
        child.parent = node.parent
        node.parent.children[int(node.tokens[0])] = child


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    first = int(differs.argmax()) if length else 0
    return first if length and differs[first] else length


def _split(node: _Node, at: int) -> _Node:
    """Put a node into the edge to ``node``, behind ``at`` tokens, and return it."""
    assert node.parent is not None
    upper = _Node(node.tokens[:at], node.parent)
    node.parent.children[int(node.tokens[0])] = upper
    node.tokens, node.parent = node.tokens[at:], upper
    upper.children[int(node.tokens[0])] = node
    return upper


def _any_sequence(node: _Node) -> int:
    """Return a sequence that ends at or below a node: the one entered last of those that part."""
    while not node.sequence_ids:
        node = next(reversed(node.children.values()))
    return next(reversed(node.sequence_ids))
