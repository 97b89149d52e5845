"""Tables in HTML, of reports and of explanations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", numbers: Sequence[str] = ()
) -> str:
    """Return a table; a row of cells in HTML each.

    Args:
        head: titles of the columns; none for a table without titles.
        rows: the cells.
        kind: class of the table, whose cells then have ``data-label``: the title, for narrow windows.
        numbers: titles of the columns with the class ``num``.
    """
    classes = [' class="num"' if title in numbers else "" for title in head]
    labels = [f' data-label="{escape(title)}"' if kind else "" for title in head]
    titles = "".join(f"<th{own}>{escape(title)}</th>" for own, title in zip(classes, head, strict=True))
    attributes = [own + label for own, label in zip(classes, labels, strict=True)]
    body = "".join(f"<tr>{''.join(_cells(row, attributes))}</tr>" for row in rows)
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f"{opening}{top}<tbody>{body}</tbody></table>"


def _cells(row: Sequence[str], attributes: Sequence[str]) -> Iterable[str]:
    """Yield the cells of a row."""
    for cell, own in zip(row, attributes or [""] * len(row), strict=True):
        yield f"<td{own}>{cell}</td>"
