"""The explanation of a graph, as plain data."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vlcache_fx.compiler.layer_graph import LayerGraph
from vlcache_fx.errors import Reason


@dataclass(frozen=True)
class GraphExplanation:
    """One traced graph, as the backend would treat it.

    Attributes:
        kind: ``name`` of the kind (``compiler.kinds``): ``encoder`` (results are stored), ``merge`` (marks
            spans for the decoder's graph), ``cross-attending decoder`` (values that depend on the items
            alone are stored), ``decoder`` (a prefill, rewritten), ``decoding step`` (nothing to reuse) or
            ``unmodified``.
        reason: the refusal of reuse; None for a kind with reuse.
        num_layers: decoder layers found.
        merges: graph nodes at which encoder features enter the token embeddings.
        encoder_in_graph: True where the features are computed in the same graph.
        key_frontiers, value_frontiers: nodes whose rows are stored, one per layer with keys and values.
        attention: per layer, ``causal`` or ``mask``.
        results_need: ``all rows``, or the selection of rows after the last layer.
        nodes: number of graph nodes captured, and in the cold and warm programs.
        engines: of the warm program under ``lowering="tensorrt"``, the nodes of each engine.
        outside_engines: the reason for each node outside the engines.
        reason_code: the typed reason of the refusal; its ``advice`` says what to do. None for a kind with
            reuse.
        layer: the first layer that recurs, before and after the passes; None for other graphs.
    """

    kind: str
    reason: str | None = None
    num_layers: int = 0
    merges: tuple[str, ...] = ()
    encoder_in_graph: bool = False
    key_frontiers: tuple[str, ...] = ()
    value_frontiers: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    results_need: str = ""
    nodes: tuple[int, ...] = ()
    engines: tuple[tuple[str, ...], ...] = ()
    outside_engines: dict[str, str] = field(default_factory=dict)
    reason_code: Reason | None = None
    layer: LayerGraph | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the explanation as JSON-serializable data."""
        return asdict(self)

    def summary(self) -> str:
        """Return the explanation in one line."""
        if self.reason is not None:
            return f"{self.kind}: {self.reason}"
        if not self.num_layers:
            return f"{self.kind}, {self.nodes[0] if self.nodes else 0} nodes"
        mixers = ", ".join(f"{self.attention.count(name)} {name}" for name in dict.fromkeys(self.attention))
        sizes = ", ".join(map(str, self.nodes))
        return f"{self.kind} of {self.num_layers} layers ({mixers}); nodes captured, cold, warm: {sizes}"
