"""The compared systems: one model, unmodified and with reuse, with shared weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

import vlcache_fx
from vlcache_fx.bench.device import synchronizer
from vlcache_fx.bench.eager_recurrences import recurrent_modules, with_eager_recurrences
from vlcache_fx.bench.model import share_weights
from vlcache_fx.bench.rounds import MeasurementError
from vlcache_fx.integrations.recurrences import takes_recurrences
from vlcache_fx.options import Options
from vlcache_fx.store import Store, open_store

GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Variant:
    """A policy, its budget (share of the span's token-layers), the URL of a store, and the donors' dtype."""

    policy: str = "layer_aware"
    budget: float = 0.02
    store: str = "memory://"
    donor_dtype: str = "model"

    @property
    def label(self) -> str:
        """Label in tables."""
        dtype = "" if self.donor_dtype == "model" else f" {self.donor_dtype}"
        return f"{self.policy} {100 * self.budget:g} % {self.store}{dtype}"


class Systems:
    """One model as four systems: eager, plain ``torch.compile``, and compiled for reuse, cold and warm.

    Where the model has recurrences, ``compiled_long`` leaves them to eager execution (see
    ``eager_recurrences``), and ``compiled``, for prefix hits, computes them with ``vlcache.recur``: unrolled
    loops of a few chunks take minutes to compile, too. Otherwise both are the same.

    Programs do not depend on policy, budget or store: one compiled model runs all variants, and
    ``prepare_warm`` replaces its engine's options and store. Cold runs use a separate store.

    Dynamo is reset first: earlier compilations of this process would count towards its limits. Call all
    systems with the settings of ``capture.dynamo_settings``, as the model compiled for reuse does.

    Args:
        model: in eval mode, on its device.
        lowering: lowering of the model compiled for reuse, and backend of the plain ``torch.compile``.
        variants: at least one.
        capacity_bytes: capacity of each store.
        cuda_graphs: option of the model compiled for reuse.

    Raises:
        OptionError, PolicyError: the policy, store or lowering of a variant does not exist.
    """

    def __init__(
        self,
        model: Any,
        lowering: str,
        variants: Sequence[Variant],
        capacity_bytes: int = 4 * GIB,
        *,
        cuda_graphs: bool = False,
    ) -> None:
        torch._dynamo.reset()
        self.variants = tuple(variants)
        self._options = {
            variant: Options(
                policy=variant.policy,
                budget=variant.budget,
                store=variant.store,
                donor_dtype=variant.donor_dtype,
                lowering=lowering,
                capacity_bytes=capacity_bytes,
                cuda_graphs=cuda_graphs,
                dynamic=True,
            )
            for variant in variants
        }
        self.plain = model
        self.compiled: Any = torch.compile(model.forward, backend=lowering, dynamic=True)
        self.eager_recurrences = bool(recurrent_modules(model))
        self.compiled_long: Any = self.compiled
        if self.eager_recurrences:
            long = with_eager_recurrences(model)
            self.compiled_long = torch.compile(long.forward, backend=lowering, dynamic=True)
            self.compiled = torch.compile(model.forward, backend=_with_operator(lowering), dynamic=True)
        own = dataclasses.replace(self._options[self.variants[0]], store="memory://")
        self.reusing: Any = vlcache_fx.compile(
            share_weights(model),
            **{field.name: getattr(own, field.name) for field in dataclasses.fields(own)},
        )
        self._cold_options, self._cold_store = own, self.engine.store
        self._stores: dict[str, Store] = {
            url: open_store(url, capacity_bytes)
            for url in dict.fromkeys(variant.store for variant in variants)
        }
        self.device = next(model.parameters()).device
        self.synchronize = synchronizer(self.device)

    @property
    def engine(self) -> Any:
        """The engine of the model compiled for reuse."""
        return self.reusing.vlcache

    def prepare_cold(self) -> None:
        """Use an empty, separate store in the next run."""
        self.engine.store = self._cold_store
        self.engine.set_options(self._cold_options)
        self.engine.clear()

    def prepare_warm(self, variant: Variant) -> None:
        """Use this policy, budget and store in the next run.

        A store that outlives the process is reopened: its donors must not be found in a faster tier.
        """
        if outlives_process(variant.store):
            self._stores[variant.store].close()
            self._stores[variant.store] = open_store(variant.store, self._cold_options.capacity_bytes)
        self.engine.store = self._stores[variant.store]
        self.engine.set_options(self._options[variant])

    def forget_donors(self) -> None:
        """Clear the stores in memory; other stores keep their donors."""
        self._cold_store.clear()
        for url, store in self._stores.items():
            if not outlives_process(url):
                store.clear()

    def graphs_compiled(self) -> int:
        """Return the number of graphs that Dynamo captured plus programs that the engine compiled."""
        captured = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return int(captured + self.engine.stats()["compilations"])

    def report(self) -> dict[str, Any]:
        """Return the engine's report of its last call.

        Raises:
            MeasurementError: the engine was not called.
        """
        report: dict[str, Any] | None = self.engine.last_report
        if report is None:
            raise MeasurementError("the compiled model did not call its engine")
        return report

    def why_not_reused(self) -> str:
        """Return the reasons of the last call and of all refused graphs."""
        reasons = [str(self.report()["reason"]), *(str(refusal) for refusal in self.engine.refusals)]
        return "; ".join(dict.fromkeys(reasons))

    def donor_bytes(self) -> int:
        """Return the bytes of the donors of the last call."""
        entries = [self.engine.store.get(key) for key in {span["key"] for span in self.report()["spans"]}]
        return sum(entry.nbytes for entry in entries if entry is not None)

    def close(self) -> None:
        """Release the stores."""
        for store in (self._cold_store, *self._stores.values()):
            store.close()


def _with_operator(lowering: str) -> Callable[..., Any]:
    """Return a backend whose graphs have one node for a recurrence, ``vlcache.recur``."""

    @takes_recurrences
    def backend(graph_module: Any, inputs: list[Any]) -> Any:
        return torch._dynamo.lookup_backend(lowering)(graph_module, inputs)

    return backend


def outlives_process(url: str) -> bool:
    """Return True for a store with a path (``file:///donors``), False for a memory store (``memory://``)."""
    return bool(url.partition("://")[2])
