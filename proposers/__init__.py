# SPDX-License-Identifier: Apache-2.0
"""Drafts for lossless token-tree speculation; pure Python and NumPy, independent of any engine."""

from proposers.cost_model import CostModel
from proposers.drafter import TreeDrafter
from proposers.dyspec import DySpecOptions
from proposers.mixture import Mixture, Prediction
from proposers.recycling import BigramRecycling, TrigramRecycling
from proposers.source import Candidates, Source, State, VerifiedRows
from proposers.suffix import SuffixSource
from proposers.tree import ROOT, TokenTree

__all__ = [
    "ROOT",
    "BigramRecycling",
    "Candidates",
    "CostModel",
    "DySpecOptions",
    "Mixture",
    "Prediction",
    "Source",
    "State",
    "SuffixSource",
    "TokenTree",
    "TreeDrafter",
    "TrigramRecycling",
    "VerifiedRows",
]
