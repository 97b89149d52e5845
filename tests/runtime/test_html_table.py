"""Tables in HTML."""

from vlcache_fx.runtime.html_table import html_table


def test_plain_table() -> None:
    assert html_table([], [("a", "<b>1</b>")]) == (
        "<table><tbody><tr><td>a</td><td><b>1</b></td></tr></tbody></table>"
    )
    assert html_table(["x<"], []) == "<table><thead><tr><th>x&lt;</th></tr></thead><tbody></tbody></table>"


def test_table_for_narrow_windows() -> None:
    assert html_table(["name", "size"], [("a", "1")], "stack", ["size"]) == (
        '<table class="stack"><thead><tr><th>name</th><th class="num">size</th></tr></thead><tbody><tr>'
        '<td data-label="name">a</td><td class="num" data-label="size">1</td></tr></tbody></table>'
    )
