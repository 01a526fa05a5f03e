# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proposers import ROOT, TokenTree


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    tokens: list[int] = []
    parents: list[int] = []
    probs: list[float] = []
    used: set[tuple[int, int]] = set()
    for node in range(draw(st.integers(0, 14))):
        parent = draw(st.integers(ROOT, node - 1))
        token = draw(st.integers(0, 30).filter(lambda t, p=parent: (p, t) not in used))
        used.add((parent, token))
        tokens.append(token)
        parents.append(parent)
        probs.append(draw(st.floats(0, 1)) * (1.0 if parent == ROOT else probs[parent]))
    return TokenTree(tuple(tokens), tuple(parents), tuple(probs))


def path(tree: TokenTree, node: int) -> list[int]:
    nodes = []
    while node != ROOT:
        nodes.append(node)
        node = tree.parents[node]
    return nodes


@given(trees(), st.integers(0, 16))
def test_every_prefix_is_a_valid_tree(tree: TokenTree, n: int) -> None:
    tree.validate()
    cut = tree.prefix(n)
    cut.validate()
    assert len(cut) == min(n, len(tree))
    assert cut.tokens == tree.tokens[:n]


@given(trees())
def test_ancestors_and_depths_follow_the_paths(tree: TokenTree) -> None:
    expected = np.zeros((len(tree), len(tree)), np.bool_)
    for node in range(len(tree)):
        for ancestor in path(tree, node):
            expected[node, ancestor] = True
        assert tree.depths[node] == len(path(tree, node))
    assert np.array_equal(tree.ancestors(), expected)
    assert tree.ancestors().dtype == np.bool_


@given(trees())
def test_children_list_every_node_once(tree: TokenTree) -> None:
    children = tree.children
    assert set(children) == set(range(ROOT, len(tree)))
    found = sorted(node for group in children.values() for node in group.values())
    assert found == list(range(len(tree)))
    for parent, group in children.items():
        for token, node in group.items():
            assert (tree.parents[node], tree.tokens[node]) == (parent, token)


@given(trees())
def test_is_chain_means_no_branch(tree: TokenTree) -> None:
    fanout = [len(group) for group in tree.children.values()]
    assert tree.is_chain == (max(fanout) <= 1)


def test_chain_and_empty() -> None:
    tree = TokenTree.chain([5, 6, 5], [0.9, 0.5, 0.5])
    tree.validate()
    assert tree.parents == (-1, 0, 1)
    assert tree.is_chain
    assert TokenTree.EMPTY.is_chain
    assert len(TokenTree.EMPTY) == 0
    assert TokenTree.EMPTY.ancestors().shape == (0, 0)
    assert not TokenTree((1, 2), (-1, -1), (0.5, 0.4)).is_chain


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TokenTree((1, 2), (-1,), (0.5, 0.5)), "lengths"),
        (TokenTree((1, 2), (1, -1), (0.5, 0.5)), "node 0 has parent 1"),
        (TokenTree((1, 2), (-1, 1), (0.5, 0.5)), "node 1 has parent 1"),
        (TokenTree((1,), (-2,), (0.5,)), "node 0 has parent -2"),
        (TokenTree((1, 2), (-1, 0), (0.5, 0.6)), "node 1 has path probability 0.6"),
        (TokenTree((1,), (-1,), (1.5,)), "node 0 has path probability 1.5"),
        (TokenTree((1,), (-1,), (float("nan"),)), "node 0 has path probability nan"),
        (TokenTree((7, 7), (-1, -1), (0.5, 0.4)), "node 1 repeats token 7"),
    ],
)
def test_validate_names_the_broken_rule(tree: TokenTree, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree.validate()


@given(trees(), st.data())
def test_pruning_keeps_paths(tree: TokenTree, data: st.DataObject) -> None:
    keep: list[bool] = []
    for parent in tree.parents:
        keep.append(data.draw(st.booleans()) and (parent == ROOT or keep[parent]))
    pruned = tree.pruned(keep)
    pruned.validate()
    kept = [node for node, wanted in enumerate(keep) if wanted]
    texts = [[pruned.tokens[n] for n in path(pruned, node)] for node in range(len(pruned))]
    assert texts == [[tree.tokens[n] for n in path(tree, node)] for node in kept]
    assert pruned.probs == tuple(tree.probs[node] for node in kept)
    assert (pruned is tree) is all(keep)


def test_pruning_an_inner_node_alone_is_an_error() -> None:
    with pytest.raises(KeyError):
        TokenTree.chain([1, 2], [0.5, 0.4]).pruned([False, True])
