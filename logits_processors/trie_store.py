# SPDX-License-Identifier: Apache-2.0
"""Keeping prefix tries: one per (model, prompt, constraint, law), bounded, and on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .law import SamplingLaw
from .prefix_trie import Node, PrefixTrie

_FORMAT = 2
_ARRAYS = {
    "parent": np.int64,
    "token": np.int64,
    "log_edge": np.float64,
    "log_rest": np.float64,
}
_ROUNDING = 1e-6


def trie_key(
    model: str, prompt: Sequence[int], constraint_key: str, law: SamplingLaw, max_tokens: int
) -> str:
    """Return the hex digest of all that the bounds of a trie depend on.

    The length limit is one of them: texts that do not fit it count as failures.
    """
    shape = [law.temperature, law.top_k, law.top_p, max_tokens]
    parts = [model, list(prompt), constraint_key, *shape]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class TrieStore:
    """Tries by key, least recently used first out.

    Args:
        max_nodes: prefixes in all tries together. Tries in use stay whole until their requests end;
            the store only forgets them.
        max_nodes_per_trie: prefixes in one trie.

    Raises:
        ValueError: a bound that is not positive.
    """

    def __init__(self, max_nodes: int = 1_000_000, max_nodes_per_trie: int = 100_000) -> None:
        if max_nodes < 1 or max_nodes_per_trie < 1:
            raise ValueError(
                f"max_nodes={max_nodes}, max_nodes_per_trie={max_nodes_per_trie}: "
                "positive numbers are allowed"
            )
        self._max_nodes = max_nodes
        self._max_nodes_per_trie = max_nodes_per_trie
        self._tries: OrderedDict[str, PrefixTrie] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tries)

    def __contains__(self, key: str) -> bool:
        return key in self._tries

    def __iter__(self) -> Iterator[PrefixTrie]:
        """Iterate over the tries, the most recently used last."""
        return iter(self._tries.values())

    @property
    def num_nodes(self) -> int:
        """Prefixes in all tries together."""
        return sum(trie.num_nodes for trie in self._tries.values())

    def get(self, key: str) -> PrefixTrie:
        """Return the trie of ``key``, a new one if it is unknown, and forget old ones if full."""
        trie = self._tries.setdefault(key, PrefixTrie(self._max_nodes_per_trie))
        self._tries.move_to_end(key)
        while len(self._tries) > 1 and self.num_nodes > self._max_nodes:
            self._tries.popitem(last=False)
        return trie


def save_trie(trie: PrefixTrie, key: str, path: Path) -> None:
    """Write a trie as a compressed ``.npz`` of plain arrays, replacing ``path`` at once.

    Args:
        trie: what was learnt.
        key: its :func:`trie_key`.
        path: the file.
    """
    nodes = list(trie)
    index = {id(node): i for i, node in enumerate(nodes)}
    columns = {
        "parent": [-1 if n.parent is None else index[id(n.parent)] for n in nodes],
        "token": [n.token for n in nodes],
        "log_edge": [n.log_edge for n in nodes],
        "log_rest": [math.nan if n.log_rest is None else n.log_rest for n in nodes],
    }
    header = json.dumps({"format": _FORMAT, "key": key, "max_nodes": trie.max_nodes})
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(
            file,
            allow_pickle=False,
            header=np.frombuffer(header.encode(), dtype=np.uint8),
            **{name: np.array(columns[name], dtype=dtype) for name, dtype in _ARRAYS.items()},
        )
    temporary.replace(path)


def load_trie(path: Path, key: str) -> PrefixTrie:
    """Read a trie written by :func:`save_trie`; nothing in the file is executed.

    Bounds are computed afresh from the masses in the file, which have to fit together.

    Args:
        path: the file.
        key: the :func:`trie_key` that it has to be of.

    Raises:
        ValueError: not such a file, another key, or contents that no trie can have.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            columns = {name: file[name] for name in _ARRAYS}
            layout, saved_key, max_nodes = (header[name] for name in ("format", "key", "max_nodes"))
    except Exception as error:  # what a broken file raises depends on where it is broken
        raise ValueError(
            f"{path}: not a saved trie ({type(error).__name__}: {error}); delete it to start afresh"
        ) from error
    if layout != _FORMAT:
        raise ValueError(f"{path}: format {layout!r}, readable is {_FORMAT}")
    if saved_key != key:
        raise ValueError(
            f"{path}: saved for key {saved_key!r}, wanted {key!r}; a trie holds for one "
            "model, prompt, constraint and sampling law only"
        )
    if type(max_nodes) is not int or max_nodes < 1:
        raise ValueError(f"{path}: max_nodes={max_nodes!r}; a positive integer is allowed")
    _check_columns(path, columns, max_nodes)
    trie = PrefixTrie(max_nodes)
    nodes = [trie.root]
    for i, rest in enumerate(columns["log_rest"].tolist()):
        if i:
            parent = nodes[int(columns["parent"][i])]
            node = Node(parent, int(columns["token"][i]), float(columns["log_edge"][i]))
            if node.token in parent.children:
                raise ValueError(f"{path}: node {i} repeats a prefix")
            parent.children[node.token] = node
            nodes.append(node)
        nodes[i].log_rest = None if math.isnan(rest) else rest
    trie.num_nodes = len(nodes)
    trie.recompute()
    return trie


def _check_columns(path: Path, columns: dict[str, NDArray[Any]], max_nodes: int) -> None:
    """Raise ``ValueError`` unless the arrays describe a trie with parents before children."""
    parent, edge, rest = columns["parent"], columns["log_edge"], columns["log_rest"]
    size = parent.size
    if any(column.shape != (size,) for column in columns.values()) or not size:
        raise ValueError(f"{path}: arrays of different length")
    if any(columns[name].dtype != dtype for name, dtype in _ARRAYS.items()):
        raise ValueError(f"{path}: arrays of an unexpected type")
    if size > max_nodes:
        raise ValueError(f"{path}: {size} nodes, its own bound is {max_nodes}")
    if parent[0] != -1 or (parent[1:] < 0).any() or (parent[1:] >= np.arange(1, size)).any():
        raise ValueError(f"{path}: a node comes before its parent")
    if (columns["token"][1:] < 0).any():
        raise ValueError(f"{path}: a negative token")
    if (edge > 0.0).any() or np.isnan(edge).any():
        raise ValueError(f"{path}: log_edge holds what is no log probability")
    if (rest > 0.0).any():
        raise ValueError(f"{path}: log_rest holds what is no log probability")
    if np.isnan(rest[parent[1:]]).any():
        raise ValueError(f"{path}: a node has children and was never visited")
    mass = np.exp(rest)
    np.add.at(mass, parent[1:], np.exp(edge[1:]))
    if (mass > 1.0 + _ROUNDING).any():
        raise ValueError(f"{path}: the probabilities after a prefix exceed 1")
