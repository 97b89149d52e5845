"""Stand-ins for the two operators that torchvision's Python half expects of its compiled half.

The published torchvision is compiled against the CUDA build of torch: the CPU build cannot load its library,
and ``import torchvision`` fails. vLLM only needs the import; it does not call these operators for this model.
This file is copied into vLLM's environment, where a ``.pth`` line imports it at every start: vLLM inspects
models in child processes.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = ("nms", "qnms")
_libraries: list[Any] = []  # operators live as long as their library object


class DefineOperators(importlib.abc.MetaPathFinder):
    """Finds no module; defines the operators when torchvision is imported (importing torch is slow)."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:  # noqa: ARG002
        """Part of the protocol of ``sys.meta_path``."""
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        make: Any = torch.library.Library  # untyped in torch
        library = make("torchvision", "FRAGMENT")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


sys.meta_path.insert(0, DefineOperators())
