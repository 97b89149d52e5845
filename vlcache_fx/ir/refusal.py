"""Typed refusals that name the node and its source line."""

import re

from torch.fx import Node

from vlcache_fx.errors import Reason, UnsupportedGraphError


def source_line(node: Node) -> str | None:
    """``file:line in function: code`` of the user code that the node was traced from, if tracing kept it."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    lines = [line.strip() for line in str(trace).splitlines() if line.strip()]
    frames = [index for index, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return None
    last = frames[-1]
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f"{lines[last].removeprefix('File ')}: {code}".rstrip(": ")


def without_folders(text: str | None) -> str | None:
    """``text`` with quoted paths cut down to files' names, for what is read on other machines."""
    return None if text is None else re.sub(r'"[^"\n]*[/\\]([^"/\\\n]+\.py)"', r'"\1"', text)


def refuse(reason: Reason, node: Node | None, detail: str) -> UnsupportedGraphError:
    """The error to raise for a graph that cannot be handled because of ``node``."""
    if node is None:
        return UnsupportedGraphError(reason, detail)
    return UnsupportedGraphError(reason, detail, node=node.name, source_line=source_line(node))
