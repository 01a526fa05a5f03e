# SPDX-License-Identifier: Apache-2.0
"""The endpoint plugin of vLLM's API server, loaded where ``VLLM_PLUGINS`` names it.

It adds nothing where the package is switched off.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from logits_processors.switch import is_disabled
from vllm_ext import background
from vllm_ext.constraints import http


class Endpoints:
    """What we add to a server, as vLLM's ``EndpointPlugin`` protocol wants it."""

    name = "vllm_ext"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and middleware."""
        if not is_disabled():
            http.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engine, and begin what goes on beside serving."""
        if is_disabled():
            return
        state.vllm_ext_engine = engine_client
        state.vllm_ext_background = background.start(engine_client)
