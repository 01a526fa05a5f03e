# SPDX-License-Identifier: Apache-2.0
import asyncio
from argparse import Namespace
from types import SimpleNamespace

from fastapi import FastAPI

from vllm_ext import background
from vllm_ext.endpoints import Endpoints


def test_the_plugin_is_what_vllm_wants() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert isinstance(Endpoints(), EndpointPlugin)


def test_routes_state_and_background(monkeypatch) -> None:
    monkeypatch.setattr(background, "start", lambda engine: ("begun for", engine))
    app, engine = FastAPI(), SimpleNamespace()
    plugin = Endpoints()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, Namespace()))
    assert "/v1/constraints/results" in [getattr(route, "path", "") for route in app.routes]
    assert app.state.vllm_ext_engine is engine
    assert app.state.vllm_ext_background == ("begun for", engine)


def test_switched_off_it_adds_nothing(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_EXT_DISABLE", "1")
    monkeypatch.setattr(background, "start", lambda engine: ("begun for", engine))
    app = FastAPI()
    routes, middleware = list(app.routes), list(app.user_middleware)
    plugin = Endpoints()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(SimpleNamespace(), app.state, Namespace()))
    assert (app.routes, app.user_middleware) == (routes, middleware)
    assert not app.state._state
