# SPDX-License-Identifier: Apache-2.0
"""vLLM plugin: token-tree speculation and constraints that leave the model's distribution alone."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-ext")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
