# SPDX-License-Identifier: Apache-2.0
"""The endpoint plugin of vLLM's API server, loaded where ``VLLM_PLUGINS`` names it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_ext import background
from vllm_ext.constraints import http


class Endpoints:
    """What we add to a server, as vLLM's ``EndpointPlugin`` protocol wants it."""

    name = "vllm_ext"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and middleware."""
        http.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engine, and begin what goes on beside serving."""
        state.vllm_ext_engine = engine_client
        state.vllm_ext_background = background.start(engine_client)
