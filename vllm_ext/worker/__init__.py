# SPDX-License-Identifier: Apache-2.0
"""Worker and model runner subclasses: the seam to vLLM's engine."""
