"""Stand-ins for the two operators that torchvision's Python half expects of its compiled half.

The published torchvision is compiled against the CUDA build of torch: its library cannot be loaded into the
CPU build, and ``import torchvision`` fails. vLLM needs the import alone; it calls neither operator for this
model. This file is copied into the peer's environment, where a ``.pth`` line imports it at every start: vLLM
inspects models in processes of its own.
"""

import importlib.abc
import sys
from typing import Any

OPERATORS = ("nms", "qnms")
_libraries: list[Any] = []  # an operator lives as long as the library object that defined it


class DefineOperators(importlib.abc.MetaPathFinder):
    """Finds no module; defines the operators when torchvision is looked for (importing torch is slow)."""

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
