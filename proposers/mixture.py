# SPDX-License-Identifier: Apache-2.0
"""One calibrated prediction from several sources: a mixture whose weights are learned online.

With sources s, each in a confidence bucket b_s for the context at hand, and b = (b_1, b_2, ...),

    q(t | context) = sum_s w_s(b) * p_s(t | context),      sum_s w_s(b) = 1 - w_0(b)

where w_0 is the weight of "none of the sources". Online expectation-maximisation (Cappe and
Moulines, arXiv 0712.4273) moves the weights towards the responsibilities of the token t that the
target chose,

    w <- (1 - eta) * w + eta * r,      r_s proportional to w_s * p_s(t),

so that q becomes the rate at which drafted tokens are accepted. A source's own missing mass
1 - sum_t p_s(t) stands, like w_0, for the tokens that no source named. Requests sampled greedily
and at a temperature accept at different rates and have separate weights.

The weights belong to all requests. A request's own text leans on one source or another (a summary
copies, a chat does not), in every bucket alike; so each request has a factor per source,

    w_s(b, request) ~ w_s(b) * a_s,      a_s = (k + sum of r_s) / (k + sum of w_s),

summed over what the request has shown, with k observations' worth of doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proposers.source import Candidates, Source, State

_PRIOR_STRENGTH = 8.0
"""Observations that the prior weights count for."""

_MEMORY = 400.0
"""Observations after which old ones begin to be forgotten."""

_PRIOR_LEAK = 0.02
"""Share of the prior in every update: keeps a weight from reaching 0, where EM would leave it."""


_BIAS_DOUBT = 4.0
_BIAS_MEMORY = 0.98
_BIAS_RETURN = (1.0 - _BIAS_MEMORY) * _BIAS_DOUBT
"""How slowly a request's factors leave 1, what share of the evidence each observation keeps, and
what draws the factors back to 1."""


class Bias:
    """One request's factors on the weights of the sources; the last one is that of "none"."""

    __slots__ = ("_applied", "_expected", "_seen", "factors")

    def __init__(self, sources: int) -> None:
        self.factors = [1.0] * (sources + 1)
        self._seen = [_BIAS_DOUBT] * (sources + 1)
        self._expected = [_BIAS_DOUBT] * (sources + 1)
        self._applied: dict[int, tuple[Sequence[float], list[float]]] = {}

    def move(self, responsibilities: Sequence[float], weights: Sequence[float]) -> None:
        """Compare what a token says about the sources with what the common weights said."""
        seen, expected, factors = self._seen, self._expected, self.factors
        last = len(seen) - 1
        none_seen = none_expected = 1.0
        for i in range(last):
            r, w = responsibilities[i], weights[i]
            none_seen -= r
            none_expected -= w
            seen[i] = _BIAS_MEMORY * seen[i] + r + _BIAS_RETURN
            expected[i] = _BIAS_MEMORY * expected[i] + w + _BIAS_RETURN
            factors[i] = seen[i] / expected[i]
        seen[last] = _BIAS_MEMORY * seen[last] + none_seen + _BIAS_RETURN
        expected[last] = _BIAS_MEMORY * expected[last] + none_expected + _BIAS_RETURN
        factors[last] = seen[last] / expected[last]
        self._applied.clear()

    def applied(self, weights: Sequence[float]) -> list[float]:
        """The request's own weights, which with that of "none" sum to 1 as before."""
        known = self._applied.get(id(weights))
        if known is not None:  # which keeps `weights` alive, so that its id is its own
            return known[1]
        scaled = [w * a for w, a in zip(weights, self.factors)]  # noqa: B905 (one factor more)
        total = sum(scaled) + (1.0 - sum(weights)) * self.factors[-1]
        made = [w / total for w in scaled]
        self._applied[id(weights)] = weights, made
        return made


class _Weights:
    """The mixture weights of one combination of buckets, one per source."""

    __slots__ = ("count", "prior", "values")

    def __init__(self, odds: Sequence[float]) -> None:
        total = 1.0 + sum(odds)
        self.prior = [o / total for o in odds]
        self.values = list(self.prior)
        self.count = _PRIOR_STRENGTH

    def move(self, responsibilities: Sequence[float]) -> None:
        self.count = min(self.count + 1.0, _MEMORY)
        eta = 1.0 / self.count
        fresh, leak, keep = eta * (1.0 - _PRIOR_LEAK), eta * _PRIOR_LEAK, 1.0 - eta
        self.values = [
            keep * value + fresh * r + leak * prior
            for value, r, prior in zip(self.values, responsibilities, self.prior)  # noqa: B905
        ]


@dataclass(slots=True)
class Prediction:
    """What the mixture expects after one context.

    Attributes:
        probs: estimated acceptance probability of each candidate token.
        weights: the cell of the mixture that was used.
        values: its weights as the request has them.
        candidates: what each source said, in the mixture's order.
        bias: the request's factors, if it has any.
    """

    probs: dict[int, float]
    weights: _Weights
    values: list[float]
    candidates: list[Candidates]
    bias: Bias | None


class Mixture:
    """Mixes the candidates of `sources`; order matters only for reproducibility."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._cells: dict[tuple[int, ...], _Weights] = {}

    def root(self, request: str) -> list[State]:
        """Every source's state of a request's committed context."""
        return [source.root(request) for source in self.sources]

    def advance(self, states: list[State], token: int) -> list[State]:
        """Every source's state after one more token."""
        return [
            source.advance(state, token) for source, state in zip(self.sources, states, strict=True)
        ]

    def predict(self, states: list[State], greedy: bool, bias: Bias | None = None) -> Prediction:
        """The mixture in a context, by the rules for greedy or for sampled requests, and with a
        request's own factors.
        """
        key = [int(greedy)]
        candidates = []
        for source, state in zip(self.sources, states):  # noqa: B905 (hot: strict costs time)
            bucket, found = source.candidates(state)
            key.append(bucket)
            candidates.append(found)
        weights = self._cells.get(tuple(key)) or self._new_cell(key)
        values = weights.values if bias is None else bias.applied(weights.values)
        probs: dict[int, float] = {}
        for weight, found in zip(values, candidates):  # noqa: B905
            for token, prob in found.items():
                if token in probs:
                    probs[token] += weight * prob
                else:
                    probs[token] = weight * prob
        return Prediction(probs, weights, values, candidates, bias)

    def _new_cell(self, key: Sequence[int]) -> _Weights:
        greedy = bool(key[0])
        odds = [s.prior(b, greedy) for s, b in zip(self.sources, key[1:], strict=True)]
        cell = self._cells[tuple(key)] = _Weights(odds)
        return cell

    def learn(self, prediction: Prediction, token: int) -> None:
        """Tell which token the target chose where `prediction` was made."""
        cell, said = prediction.weights, prediction.candidates
        if token in prediction.probs:
            likelihoods = [found.get(token, 0.0) for found in said]
        else:
            likelihoods = [max(0.0, 1.0 - sum(found.values())) for found in said]
        named = token in prediction.probs
        bias = prediction.bias
        if bias is not None:
            own = _responsibilities(prediction.values, likelihoods, named)
            if own is not None:
                bias.move(own, cell.values)
        common = _responsibilities(cell.values, likelihoods, named)
        if common is not None:
            cell.move(common)


def _responsibilities(
    weights: Sequence[float], likelihoods: Sequence[float], named: bool
) -> list[float] | None:
    """How probably each source, rather than another or none, explains a token."""
    shares = [w * x for w, x in zip(weights, likelihoods)]  # noqa: B905 (hot)
    total = sum(shares) + (0.0 if named else 1.0 - sum(weights))
    return [share / total for share in shares] if total > 0.0 else None
