# SPDX-License-Identifier: Apache-2.0
"""Train a draft head (`proposers.hydra`) on what its target writes.

`writing` lets the target write in a vLLM engine, `features` keeps its hidden states and what it
says after each token, `training` fits the head, and `run` does one after the other.
"""
