# SPDX-License-Identifier: Apache-2.0
"""Constraints that leave the model's distribution alone, and the samplers that keep it so.

Nothing here knows an engine: constraints answer questions about tokens, samplers turn a row of
logits into a token and a weight. See ``constraint`` and ``sampler`` for the two interfaces.
"""
