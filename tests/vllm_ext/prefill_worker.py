# SPDX-License-Identifier: Apache-2.0
"""A worker that writes down what it was given and asked for."""

from __future__ import annotations

from typing import Any

from vllm_ext.worker import runner as runner_module
from vllm_ext.worker.cpu import TreeCPUWorker


class PrefillWorker(TreeCPUWorker):
    """The real worker, plus a log of its steps."""

    steps: list[dict[str, int]]
    asked = 0

    def watch(self) -> None:
        """Begin the log."""
        self.steps = []

    def execute_model(self, scheduler_output: Any) -> Any:
        """As the real one."""
        if hasattr(self, "steps") and scheduler_output.total_num_scheduled_tokens:
            self.steps.append(dict(scheduler_output.num_scheduled_tokens))
        return super().execute_model(scheduler_output)

    def take_draft_token_ids(self) -> Any:
        """Called by vLLM's message, not by our runner."""
        self.asked += 1
        return super().take_draft_token_ids()

    def messages_for_drafts(self) -> int:
        """How often the drafts were asked for."""
        return self.asked

    def steps_to_read(self, prefix: str, tokens: int) -> int:
        """Steps from a prompt's first tokens to its last, of so many; -1 if it was not read."""
        first = -1
        for number, step in enumerate(self.steps):
            got = sum(n for name, n in step.items() if name.startswith(prefix))
            if got and first < 0:
                first = number
            tokens -= got
            if tokens <= 0:
                return number - first + 1
        return -1

    def lift_the_limit(self) -> None:
        """Let trees take the whole budget."""
        runner_module.batch_limit = lambda *_: 10**6

    def enclose_nothing(self) -> None:
        """Leave the drafts to vLLM's own message."""
        runner_module.enclose = lambda output, drafts: output
