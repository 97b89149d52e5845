"""The models of a server: loaded when it starts, compiled, and kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

import vlcache_fx
from vlcache_fx.errors import OptionError
from vlcache_fx.fidelity.models import NAMED, load_model
from vlcache_fx.runtime.engine import ServingEngine
from vlcache_fx.serve.errors import RequestError
from vlcache_fx.serve.options import ServeOptions
from vlcache_fx.serve.sources import check_sources


class ServedModels(ModelManager):
    """The models that the command line names, and no others: nothing is loaded for a request, or unloaded.

    Args:
        options: which models, and how to compile them.

    Attributes:
        sources: name in requests -> ``reference``, ``photo``, ``hybrid`` or a folder.

    Raises:
        OptionError: there is no such model, or two have one name.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.sources = check_sources(options.models)
        device = (
            ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
        )
        try:
            super().__init__(device=device, dtype=options.dtype, model_timeout=-1)
        except ValueError as error:
            raise OptionError(str(error)) from error
        self._options = options
        self._served: dict[str, tuple[Any, Any]] = {}
        self._ready: set[str] = set()
        self._guard = threading.Lock()

    @property
    def engines(self) -> dict[str, ServingEngine]:
        """The engines of the models that are loaded, by name."""
        with self._guard:
            return {name: model.vlcache for name, (model, _) in self._served.items()}

    @property
    def is_ready(self) -> bool:
        """Whether every model is loaded, and has answered an example."""
        return self._ready == set(self.sources)

    def states(self) -> dict[str, str]:
        """Each model's state: ``loading``, ``compiling`` or ``ready``."""
        loaded = self.engines
        return {
            name: "ready" if name in self._ready else "compiling" if name in loaded else "loading"
            for name in self.sources
        }

    def load(self, name: str) -> tuple[Any, Any]:
        """Load and compile a model; return it with its processor.

        Raises:
            OptionError: it cannot be loaded, or takes no chats.
        """
        model, processor = self._load(name)
        if not getattr(processor, "chat_template", None):
            raise OptionError(f"the model {name!r} cannot be served: its processor has no chat template")
        compiled = vlcache_fx.compile(model, **{"dynamic": True, **self._options.engine})
        with self._guard:
            self._served[name] = compiled, processor
        return compiled, processor

    def is_now_ready(self, name: str) -> None:
        """The model has answered an example: its programs are compiled."""
        self._ready.add(name)

    def _load(self, name: str) -> tuple[Any, Any]:
        source = self.sources[name]
        if source in NAMED:
            model, processor = load_model(source)
            return model.to(self.device), processor
        folder = f"{source}@main"
        try:
            loaded: Any = self._load_model(folder)
            return loaded.train(False), self._load_processor(folder)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            raise OptionError(f"cannot load the model in {source!r}: {error}") from error

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Names are those of the command line: no revision is added."""
        return model_id

    def check_name(self, name: object) -> None:
        """Check that a request's model is served.

        Raises:
            RequestError: 404 if not, 503 while it is loaded or compiled.
        """
        if not isinstance(name, str) or name not in self.sources:
            raise self.unknown(name)
        if name not in self._ready:
            raise RequestError(503, f"the model {name!r} is not ready yet", code="not_ready", retry_after_s=5)

    def unknown(self, name: object) -> RequestError:
        """The error of a model that is not served."""
        message = f"the model {name!r:.100} is not served here: {', '.join(self.sources)}"
        return RequestError(404, message, code="model_not_found", param="model")

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable[..., Any] | None = None,  # noqa: ARG002 - those of the base class
        tqdm_class: type | None = None,  # noqa: ARG002
        gguf_file: str | None = None,  # noqa: ARG002
    ) -> tuple[Any, Any]:
        """Return a model that is loaded, and its processor."""
        with self._guard:
            return self._served[model_id_and_revision]

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]  # noqa: ARG002
        """The models as ``/v1/models`` lists them."""
        return [{"id": name, "object": "model", "created": 0, "owned_by": "vlcache"} for name in self.sources]

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        """What a model takes. Models of no list of transformers take pictures if they have a processor."""
        if isinstance(processor, PreTrainedTokenizerBase):
            return Modality.LLM
        try:
            return ModelManager.get_model_modality(model, processor)
        except ValueError:
            return Modality.VLM

    def shutdown(self) -> None:
        """Close the engines; their stores write what they still hold."""
        for engine in self.engines.values():
            engine.close()
