# SPDX-License-Identifier: Apache-2.0
"""Layout of trees as rows, and the match between proposed and scheduled drafts."""

from __future__ import annotations

import numpy as np

from proposers.tree import TokenTree
from vllm_ext.worker.commit import accepted_moves
from vllm_ext.worker.step import Step, TreeRows, build_step, scheduled_tree

TREE = TokenTree((1, 2, 0, 3, 2), (-1, -1, 0, 0, 1), (0.5, 0.4, 0.3, 0.2, 0.1))


def test_a_truncated_draft_is_the_tree_of_its_first_nodes() -> None:
    assert scheduled_tree(TREE, [1, 2, 0]) == TREE.prefix(3)


def test_anything_else_is_read_as_a_chain() -> None:
    for scheduled in ([1, 2, 3], [2, 1], [1, 2, 0, 3, 2, 9]):
        assert scheduled_tree(TREE, scheduled) is None
        step = batch({"a": TREE}, {"a": scheduled})
        assert step.trees[0].is_chain
        assert list(step.trees[0].tokens) == scheduled
        assert step.strangers == 1
    assert scheduled_tree(None, [4, 5]) is None
    assert batch({"a": TREE}, {"a": [1, 2]}).strangers == 0


def test_rows_see_their_ancestors_and_stand_at_their_depth() -> None:
    rows = TreeRows.build(0, 10, 100, TREE)
    assert rows.size == 6
    assert rows.depths.tolist() == [0, 1, 1, 2, 2, 2]
    assert rows.visible.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 1],
    ]


def batch(proposed: dict[str, TokenTree], scheduled: dict[str, list[int]]) -> Step:
    return build_step(
        ["a", "b", "c"],
        scheduled,
        proposed,
        np.array([0, 6, 7, 10], dtype=np.int32),
        np.array([100, 50, 20], dtype=np.int32),
    )


def test_only_branching_trees_leave_the_stock_path() -> None:
    chain = TokenTree.chain([7, 8], [0.5, 0.4])
    step = batch({"a": TREE, "c": chain}, {"a": list(TREE.tokens), "c": [7, 8]})
    assert step.starts == [0, 6, 7]
    assert [len(tree) for tree in step.trees] == [5, 0, 2]
    assert step.attention is not None
    assert [tree.request for tree in step.attention.trees] == [0]
    assert step.attention.rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert not step.attention.only_trees
    assert batch({"c": chain}, {"c": [7, 8]}).attention is None


def test_accepted_nodes_move_to_the_slots_of_their_depth() -> None:
    step = batch({"a": TREE}, {"a": list(TREE.tokens)})
    assert step.attention is not None
    # path: node 1 (depth 1), node 4 (depth 2); stash rows are node + 1; row of depth d is start + d
    assert accepted_moves(step.attention, [[1, 4], [], []]) == ([2, 5], [1, 2])
    # node 0 at depth 1 is in place already; node 2 at depth 2 is not
    assert accepted_moves(step.attention, [[0, 2], [], []]) == ([3], [2])
    assert accepted_moves(step.attention, [[], [], []]) == ([], [])
