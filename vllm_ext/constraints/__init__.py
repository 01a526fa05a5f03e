# SPDX-License-Identifier: Apache-2.0
"""Constraints from the caller's side: generating with weights, asking for results.

::

    params = SamplingParams(max_tokens=64, extra_args={"constraint_regex": r"(yes|no)\\."})
    for sample in vllm_ext.constraints.generate(llm, ["Is water wet? "] * 8, params):
        print(sample.text, sample.log_weight, sample.record.state)

The keys of ``extra_args`` are in ``docs/constraints.md``.
"""

from .offline import Sample, generate, results

__all__ = ["Sample", "generate", "results"]
