"""A plan as EXPLAIN tells it, walked: its nodes, the rows it looked at, the blocks it touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from nodes(child)


def looked_at(node: dict[str, Any]) -> int:
    """How many rows of its table a node met."""
    rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return int(rows * node["Actual Loops"])


def blocks(node: dict[str, Any]) -> int:
    """How many blocks a plan touched, in memory or on disk. A node's count has its children in it, but not all of them:
    what a `with` changes, it changes when the rest is done."""
    own = _blocks_of(node)
    children = node.get("Plans", ())
    return max(own, sum(map(_blocks_of, children))) - sum(map(_blocks_of, children)) + sum(map(blocks, children))


def _blocks_of(node: dict[str, Any]) -> int:
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


def shown(node: dict[str, Any], depth: int = 0) -> str:
    """A line for each node."""
    words = [node["Node Type"], node.get("Operation"), node.get("Relation Name"), node.get("Index Name"), node.get("Index Cond")]
    line = f"{'  ' * depth}{' '.join(word for word in words if word)}: {looked_at(node)} rows, {_blocks_of(node)} blocks"
    return "\n".join([line, *(shown(child, depth + 1) for child in node.get("Plans", ()))])
