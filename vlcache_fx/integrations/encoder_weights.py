"""The weights on which an encoder's results depend: all of a model's but those of its decoder.

Features then survive a change of the decoder, such as another adapter. transformers says which module is the
decoder; nothing says that the encoder does not read it. So every run of the encoder is watched, and its first
read of a tensor of the decoder makes all weights count, from that run on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from vlcache_fx.integrations.module_state import ModuleState
from vlcache_fx.integrations.module_tensors import ModuleTensors
from vlcache_fx.integrations.object_graph import SMALL_BYTES

PARTS = ("get_decoder", "get_input_embeddings", "get_output_embeddings")
"""Methods of the library's models that return what an encoder does not read."""

METADATA = frozenset(
    {
        torch.is_complex,
        torch.is_floating_point,
        Tensor.is_complex,
        Tensor.is_floating_point,
        *(
            vars(torch._C.TensorBase)[name].__get__
            for name in ("device", "dtype", "is_cuda", "layout", "requires_grad")
        ),
    }
)
"""Reads that show no values. Models look for their dtype and device among all parameters."""


@dataclass(frozen=True)
class Dependence:
    """What an encoder's results depend on.

    Attributes:
        weights: its weights.
        state: digest of its other state; None if that is unknown.
        unread: tensors that it must not read.
    """

    weights: list[Tensor]
    state: str | None
    unread: list[Tensor]

    @property
    def unread_dtypes(self) -> tuple[tuple[str, int], ...]:
        """The dtypes of ``unread``, with the lengths of their runs: a model may ask for the first one."""
        runs = itertools.groupby(tensor.dtype for tensor in self.unread)
        return tuple((str(dtype), len(list(run))) for dtype, run in runs)


class EncoderWeights:
    """Finds the weights of an encoder, and watches its runs.

    All weights of the model count where it does not name its decoder, where hooks, offloading or scripted
    code may read the decoder unseen, and once a run has read it.

    Args:
        module: the model.
        encode: the encoder, a method of the model.
    """

    def __init__(self, module: nn.Module, encode: Callable[..., Any]) -> None:
        self._module, self._encode = module, encode
        self._all = ModuleTensors(module, min_bytes=SMALL_BYTES + 1)
        self._whole_state = ModuleState(module, encode, weights=self._all)
        self._unread_modules: list[nn.Module] = []
        self._kept = self._all
        self._unread: list[ModuleTensors] = []
        self._state = self._whole_state
        self._reads_decoder = False

    def current(self) -> Dependence:
        """Return what results depend on now.

        Raises:
            UnreadableWeightsError: packed weights cannot be unpacked.
        """
        modules = [] if self._reads_decoder else _unread_modules(self._module)
        if not modules:
            return self._whole()
        if [*map(id, modules)] != [*map(id, self._unread_modules)]:
            self._unread_modules = modules
            self._kept = ModuleTensors(self._module, min_bytes=SMALL_BYTES + 1, without=modules)
            self._unread = [ModuleTensors(module) for module in modules]
            # A tensor of the decoder that is found elsewhere then counts by its bytes.
            self._state = ModuleState(self._module, self._encode, weights=self._kept)
        kept = self._kept()
        ids = {id(tensor) for tensor in kept}
        unread = {id(tensor): tensor for tensors in self._unread for tensor in tensors()}
        state = self._state.digest()
        if state is None:
            return self._whole()
        return Dependence(kept, state, [tensor for key, tensor in unread.items() if key not in ids])

    def _whole(self) -> Dependence:
        return Dependence(self._all(), self._whole_state.digest(), [])

    def run(self, call: Callable[[], Any], dependence: Dependence) -> tuple[Any, bool]:
        """Run the encoder.

        Args:
            call: runs it.
            dependence: what it is thought to depend on.

        Returns:
            its result, and whether ``dependence`` held. If not, all weights count from now on.
        """
        if not dependence.unread:
            return call(), True
        reads = Reads(dependence.unread)
        try:
            with reads:
                result = call()
        except Exception:  # noqa: BLE001 - some operators refuse to run under a mode
            result = call()
            reads.found = True
        self._reads_decoder = self._reads_decoder or reads.found
        return result, not reads.found


class Reads(TorchFunctionMode):
    """Notices whether a function of torch is given one of some tensors, in this thread.

    Args:
        tensors: the tensors.

    Attributes:
        found: whether one was given to a function that may read values.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._ids = frozenset(map(id, tensors))
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See ``TorchFunctionMode``."""
        kwargs = kwargs or {}
        if not self.found and func not in METADATA:
            # What a higher-order operator calls is not seen.
            hides = isinstance(func, HigherOrderOperator)
            self.found = hides or self._is_in(args) or self._is_in(kwargs.values())
        return func(*args, **kwargs)

    def _is_in(self, values: Iterable[Any]) -> bool:
        return any(
            id(value) in self._ids if isinstance(value, Tensor) else self._is_in(_within(value))
            for value in values
        )


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _unread_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules that the encoder should not need; empty where that is unclear."""
    found: list[nn.Module] = []
    for name in PARTS:
        try:
            part = getattr(module, name)()
        except (AttributeError, NotImplementedError, TypeError):
            part = None
        if name == PARTS[0] and (not isinstance(part, nn.Module) or part is module):
            return []
        if isinstance(part, nn.Module) and part is not module:
            found.append(part)
    inner = [one for part in found for one in part.modules()]
    is_unclear = module in inner or any(map(_may_hide_reads, inner))
    return [] if is_unclear else found


def _may_hide_reads(module: nn.Module) -> bool:
    """Return whether calls of a module may read other tensors than those it shows."""
    has_hooks = bool(module._forward_pre_hooks) or "_hf_hook" in vars(module)
    return has_hooks or isinstance(module, torch.jit.ScriptModule)
