"""The cheapest way to split things into two sides (Dinic's algorithm for the minimum cut)."""

from __future__ import annotations

from collections import deque

__all__ = ["CutGraph"]


class CutGraph:
    """Things to be put on the "one" or the "other" side; costs accrue where the sides differ.

    Vertices are numbered as they are added. Vertex 0 is fixed to the one side, vertex 1 to the other.
    """

    ONE = 0
    OTHER = 1

    def __init__(self) -> None:
        self._edges_of: list[list[int]] = [[], []]
        self._heads: list[int] = []
        self._capacities: list[float] = []

    def add_vertex(self) -> int:
        """The number of a new vertex."""
        self._edges_of.append([])
        return len(self._edges_of) - 1

    def add_cost(self, tail: int, head: int, cost: float) -> None:
        """Pay `cost` when `tail` is on the one side and `head` on the other. Infinite forbids that."""
        for start, end, capacity in ((tail, head, cost), (head, tail, 0.0)):
            self._edges_of[start].append(len(self._heads))
            self._heads.append(end)
            self._capacities.append(capacity)

    def one_side(self) -> frozenset[int]:
        """The vertices on the one side of a cheapest split, as few as possible among those equally cheap."""
        levels = self._levels()
        while levels[self.OTHER] >= 0:
            next_edge = [0] * len(self._edges_of)
            while self._push(levels, next_edge):
                pass
            levels = self._levels()
        return frozenset(vertex for vertex, level in enumerate(levels) if level >= 0)

    def _levels(self) -> list[int]:
        """Distance of every vertex from the one side through edges with capacity left; -1: not reached."""
        levels = [-1] * len(self._edges_of)
        levels[self.ONE] = 0
        queue = deque([self.ONE])
        while queue:
            vertex = queue.popleft()
            for edge in self._edges_of[vertex]:
                head = self._heads[edge]
                if levels[head] < 0 and self._capacities[edge] > _NEGLIGIBLE:
                    levels[head] = levels[vertex] + 1
                    queue.append(head)
        return levels

    def _push(self, levels: list[int], next_edge: list[int]) -> bool:
        """Send what one path from ONE to OTHER still carries; False when no path is left."""
        path: list[int] = []
        vertex = self.ONE
        while vertex != self.OTHER:
            edges = self._edges_of[vertex]
            while next_edge[vertex] < len(edges):
                edge = edges[next_edge[vertex]]
                head = self._heads[edge]
                if self._capacities[edge] > _NEGLIGIBLE and levels[head] == levels[vertex] + 1:
                    break
                next_edge[vertex] += 1
            else:
                if not path:
                    return False
                # A dead end: step back and never come here again at this distance.
                dead_edge = path.pop()
                vertex = self._heads[dead_edge ^ 1]
                next_edge[vertex] += 1
                continue
            path.append(edge)
            vertex = head
        amount = min(self._capacities[edge] for edge in path)
        for edge in path:
            self._capacities[edge] -= amount
            self._capacities[edge ^ 1] += amount
        return True


# Capacities are costs of 1 and more; what is left of one by rounding is none.
_NEGLIGIBLE = 1e-9
