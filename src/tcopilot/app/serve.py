"""`tcopilot-serve`: an OpenAI-compatible endpoint for a fused model, by the request handlers of `transformers serve`.

The model is an export of this package, and each request may choose its λ (docs/serving.md).
"""

import argparse
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
import transformers
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from tcopilot.app.console import quiet_libraries
from tcopilot.models.configuration import WANTED, TCopilotConfig
from tcopilot.models.families import learned_positions
from tcopilot.models.fused_model import TCopilotModel
from tcopilot.models.fusion import check_weight
from tcopilot.models.modeling import fused_class

BAD_REQUEST = (ValueError, TypeError, KeyError, TemplateError)
"""What handlers, chat templates and `generate` raise at a request that cannot be answered."""


class Export(NamedTuple):
    """A loaded fused model, and the name under which it is served: its folder."""

    name: str
    model: TCopilotModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> "Export":
        """Read an export; a ValueError says what the folder lacks."""
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: there is no model in this folder; {WANTED}")
        config = AutoConfig.from_pretrained(folder)
        if not isinstance(config, TCopilotConfig):
            raise ValueError(f"{folder}: a {config.model_type} model, which `transformers serve` serves; {WANTED}")
        if not any(folder.glob("tokenizer*")):
            raise ValueError(f"{folder}: there is no tokenizer beside the model; {WANTED}")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = fused_class(config.is_encoder_decoder).from_pretrained(folder, device_map=device)
        return cls(str(folder), model, AutoTokenizer.from_pretrained(folder))


class RequestModel:
    """The model as one request sees it, with its λ and its seed; weights are shared, and nothing in them is changed.

    The config is the Pilot's, by which handlers know how its family writes tool calls and reasoning.
    """

    def __init__(self, model: TCopilotModel, weight: float | None, seed: int | None) -> None:
        self.model, self.weight, self.seed, self.config = model, weight, seed, model.config.pilot

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, **given: Any) -> Tensor:
        """Decode one prompt; returns it with its answer [1, M + N], for an encoder-decoder too."""
        if self.seed is not None:
            torch.manual_seed(self.seed)  # here, in the one thread that decodes, and not while another request samples
        if self.weight is not None:
            given["weights_B"] = torch.tensor([self.weight], device=self.model.device)
        given["generation_config"].num_return_sequences = 1  # a stream would mix the tokens of several
        is_answer = self.model.config.is_encoder_decoder
        if (positions := learned_positions(self.model.pilot)) is not None:  # beyond them a GPU fails for good
            prompt, config = given["input_ids"].shape[1], given["generation_config"]
            if prompt > positions:
                raise ValueError(f"the prompt has {prompt} tokens, the model has {positions} positions; shorten it")
            room = positions if is_answer else positions - prompt + 1
            config.max_new_tokens = config.max_new_tokens and min(config.max_new_tokens, room)
        found = self.model.generate(**given)
        return torch.cat([given["input_ids"], found[:, 1:]], dim=1) if is_answer else found


class ExportHandler:
    """Extends a handler of transformers: serves one export, and reads λ from a request's field `weight`."""

    export: Export

    def _validate_request(self, body: dict[str, Any]) -> None:
        super()._validate_request({key: value for key, value in body.items() if key != "weight"})
        name, model, tokenizer = self.export
        if body.get("model") not in (None, name):
            raise ValueError(f"model={body['model']!r}: this server has {name!r} only")
        check_weight_for(model, body.get("weight"))
        if "messages" in body and tokenizer.chat_template is None:
            raise ValueError("the tokenizer of this model has no chat template; use /v1/completions")
        contents = (message.get("content") for message in body.get("messages") or () if isinstance(message, dict))
        parts = (part for content in contents if isinstance(content, list) for part in content)
        if other := next((part for part in parts if not isinstance(part, dict) or part.get("type") != "text"), None):
            raise ValueError(f"messages: {other!r:.80}: this model reads parts of type text only; leave it out")

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, RequestModel, PreTrainedTokenizerBase]:
        name, model, tokenizer = self.export
        return name, RequestModel(model, body.get("weight"), body.get("seed")), tokenizer

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config({**body, "seed": None}, *args, **kwargs)
        if hasattr(config, "weight"):
            raise ValueError("generation_config: weight is a field of the request, beside generation_config")
        return config


def check_weight_for(model: TCopilotModel, weight: Any) -> None:
    """Raise a ValueError if a value is no valid λ for this model; None stands for the model's own λ."""
    if weight is not None and check_weight(weight) and model.copilot is None:
        raise ValueError(f"weight={weight}: this export is a Pilot without a Copilot; leave it out, or give 0")


def endpoint(export: Export) -> Any:
    """The FastAPI application that serves an export."""
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import GenerationState

    state = GenerationState()  # of both handlers, so that one thread decodes all requests, one after another

    def answer(handler: type) -> Callable[[dict], Awaitable[Any]]:
        served = type(handler.__name__, (ExportHandler, handler), {"export": export})(ModelManager(), state)

        async def handle(body: dict) -> Any:
            return await served.handle_request(body, str(uuid4()))

        return handle

    async def refuse(_: Request, error: Exception) -> JSONResponse:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        said = {"message": getattr(error, "detail", reason), "type": "invalid_request_error"}  # as clients expect it
        return JSONResponse({"error": said}, status_code=getattr(error, "status_code", 400))

    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": export.name, "object": "model", "created": 0, "owned_by": ""}]}

    app = FastAPI(title="Transformer Copilot", exception_handlers=dict.fromkeys((*BAD_REQUEST, HTTPException), refuse))
    app.post("/v1/chat/completions")(answer(ChatCompletionHandler))
    app.post("/v1/completions")(answer(CompletionHandler))
    app.get("/v1/models")(models)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `tcopilot-serve` until Ctrl-C; 1 with a message on stderr if it cannot start."""
    parser = argparse.ArgumentParser("tcopilot-serve", description="An OpenAI-compatible endpoint for a fused model.")
    parser.add_argument("export", type=Path, help="the export folder of a run")
    parser.add_argument("--host", default="localhost", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--weight", type=float, help="λ of requests that name none (default: the export's)")
    parser.add_argument("--continuous-batching", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.continuous_batching:
        parser.error("--continuous-batching packs many requests into one row, and a Copilot needs a row for each")
    quiet_libraries()
    try:
        import fastapi  # noqa: F401 - where it is missing, that is said before weights load
        import openai  # noqa: F401 - transformers' handlers need it, and do not say so
        import uvicorn

        with listen(asked.host, asked.port) as listening:  # before weights load
            export = Export.load(asked.export)
            check_weight_for(export.model, asked.weight)
            export.model.weight = export.model.weight if asked.weight is None else asked.weight
            server = uvicorn.Server(uvicorn.Config(endpoint(export), log_level="warning"))
            host, port = listening.getsockname()[:2]
            print(f"{export.name} at λ = {export.model.weight:g}: http://{host}:{port}/v1", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[listening])
    except (ImportError, OSError, ValueError) as error:
        needs = "the server needs pip install 'tcopilot[serve]' and transformers 5.17 to 5.23, here is"
        hint = f"; {needs} {transformers.__version__}" if isinstance(error, ImportError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Take the port, or raise a ValueError that says why it cannot be had."""
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port}: {reason}; give another one") from error


if __name__ == "__main__":
    sys.exit(main())
