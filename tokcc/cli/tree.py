"""Plain data as a tree with tables, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

__all__ = ["as_tree"]


def as_tree(name: str, data: Any) -> Tree:
    """Return nested mappings as branches and lists of flat mappings as tables."""
    tree = Tree(f"[bold]{escape(name)}[/bold]", guide_style="dim")
    _grow(tree, data)
    return tree


def _grow(tree: Tree, data: Any) -> None:
    if isinstance(data, Mapping):
        for key, value in data.items():
            if _is_leaf(value):
                tree.add(f"{escape(str(key))}: {escape(_text(value))}")
            else:
                _grow(tree.add(f"[bold]{escape(str(key))}[/bold]"), value)
    elif _is_table(data):
        tree.add(_table(data))
    elif isinstance(data, Sequence) and not isinstance(data, str):
        for index, item in enumerate(data):
            if _is_leaf(item):
                tree.add(escape(_text(item)))
            else:
                _grow(tree.add(str(index)), item)
    else:
        tree.add(escape(_text(data)))


def _is_leaf(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, Sequence) and not isinstance(value, str):
        # Sentences get a line each.
        return all(not isinstance(item, Mapping | list | tuple) and " " not in str(item) for item in value)
    return True


def _is_table(data: Any) -> bool:
    if not isinstance(data, list | tuple) or not data:
        return False
    return all(isinstance(item, Mapping) and all(_is_leaf(value) for value in item.values()) for item in data)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(escape(str(column)))
    for row in rows:
        table.add_row(*(escape(_text(row.get(column, ""))) for column in columns))
    return table


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_text(item) for item in value) or "-"
    return str(value) if not isinstance(value, Mapping) else "-"
