"""Typed refusals with the name of the node and its source line."""

import re

from torch.fx import Node

from vlcache_fx.errors import Reason, UnsupportedGraphError


def source_line(node: Node, skipped: str | None = None) -> str | None:
    """Return ``file:line in function: code`` of the traced code of a node; None if tracing kept none.

    Args:
        node: a node.
        skipped: a part of paths; the code of such files is left out where other code calls it.
    """
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    lines = [line.strip() for line in str(trace).splitlines() if line.strip()]
    frames = [index for index, line in enumerate(lines) if line.startswith("File ")]
    if not frames:
        return None
    wanted = [index for index in frames if skipped is not None and skipped not in lines[index]]
    last = (wanted or frames)[-1]
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f"{lines[last].removeprefix('File ')}: {code}".rstrip(": ")


def without_folders(text: str | None) -> str | None:
    """Return ``text`` with quoted paths reduced to file names, for readers on other machines."""
    return None if text is None else re.sub(r'"[^"\n]*[/\\]([^"/\\\n]+\.py)"', r'"\1"', text)


def refuse(reason: Reason, node: Node | None, detail: str) -> UnsupportedGraphError:
    """Return the error for a graph that is refused because of ``node``."""
    if node is None:
        return UnsupportedGraphError(reason, detail)
    return UnsupportedGraphError(reason, detail, node=node.name, source_line=source_line(node))
