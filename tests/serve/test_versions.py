from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server

from vlcache_fx.serve.versions import taken


def test_only_known_arguments() -> None:
    def older(model: Any, inputs: Any) -> None: ...

    assert taken(older, {"model": 1, "inputs": 2, "tools": 3}) == {"model": 1, "inputs": 2}


def test_arguments_that_every_version_takes() -> None:
    """Of the installed version: what the server passes by name, and cannot do without."""
    handlers = {"model_manager", "chat_handler", "response_handler", "generation_state"}
    assert taken(build_server, dict.fromkeys(handlers)).keys() == handlers
    common = {"request_id", "model", "processor", "model_id", "inputs", "gen_config", "gen_manager"}
    for owner in (ChatCompletionHandler, ResponseHandler):
        for function in (owner._streaming, owner._non_streaming):
            assert taken(function, dict.fromkeys(common)).keys() == common
