"""Bipartition of random graphs, against brute force and against the definition."""

from __future__ import annotations

import itertools
import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pjax.graph import bipartition
from pjax.graph.bipartition import conflicts, two_colour


def split(size, edges, colours, producers):
    """The graph with the identities in place: its colours and its edges."""
    colours, edges = list(colours), list(edges)
    for producer in producers:
        identity = len(colours)
        colours.append(1 - colours[producer])
        through = []
        for source, reader in edges:
            moved = source == producer and colours[reader] == colours[producer]
            through.append((identity, reader) if moved else (source, reader))
        edges = [*through, (producer, identity)]
    return colours, edges


def fewest(size, edges):
    """The least number of producers in conflict, over all colourings."""
    best = size
    for bits in itertools.product((0, 1), repeat=max(size - 1, 0)):
        best = min(best, len(conflicts((0, *bits), edges)))
    return best


@st.composite
def acyclic_graphs(draw, most):
    size = draw(st.integers(1, most))
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=3 * size)) if pairs else []
    # Nodes in no particular order, and an edge more than once, as from a graph.
    order = draw(st.permutations(range(size)))
    return size, [(order[i], order[j]) for i, j in edges]


@settings(max_examples=150, deadline=None)
@given(acyclic_graphs(9))
def test_no_edge_stays_inside_a_colour_and_the_identities_are_as_few_as_can_be(graph):
    size, edges = graph
    colours, producers = two_colour(size, edges)
    assert len(colours) == size
    assert set(colours) <= {0, 1}
    assert producers == sorted(set(producers))
    after, routes = split(size, edges, colours, producers)
    assert all(after[producer] != after[reader] for producer, reader in routes)
    # No identity without need, and no fewer would do.
    assert producers == conflicts(colours, edges)
    assert len(producers) == fewest(size, edges)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_large_graphs_by_local_search(seed):
    """Beyond the integer program: valid, the same every time, no worse than breadth first."""
    rng = np.random.default_rng(seed)
    size = 300
    first = rng.integers(0, size - 1, 700)
    edges = [(int(i), int(rng.integers(i + 1, size))) for i in first]
    start = bipartition._breadth_first(size, sorted(set(edges)))
    found = bipartition._improve(start, sorted(set(edges)))
    assert len(conflicts(found, edges)) <= len(conflicts(start, edges))
    # No single flip helps any more.
    count = len(conflicts(found, edges))
    for node in range(0, size, 7):
        flipped = [*found[:node], 1 - found[node], *found[node + 1 :]]
        assert len(conflicts(flipped, edges)) >= count
    assert bipartition._improve(start, sorted(set(edges))) == found


def test_the_same_graph_gets_the_same_answer():
    rng = np.random.default_rng(0)
    pairs = [(int(a), int(b)) for a, b in rng.choice(30, (60, 2))]
    edges = [(min(pair), max(pair)) for pair in pairs if len(set(pair)) == 2]
    answers = [two_colour(30, edges), two_colour(30, edges[::-1]), two_colour(30, edges * 2)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][1]


def chain_of_blocks(blocks, length):
    """Residual blocks: a chain of `length` nodes beside each skip."""
    edges, node = [], 0
    for _ in range(blocks):
        path = [node, *range(node + 1, node + length + 1), node + length + 1]
        edges += [*itertools.pairwise(path), (node, node + length + 1)]
        node += length + 1
    return node + 1, edges


def recurrent(steps):
    """A recurrent network: two weights and a bias that every step reads."""
    edges, node, hidden = [], 3, None
    for _ in range(steps):
        dot, add, relu = node, node + 1, node + 2
        edges += [(0, dot), (dot, add), (2, add), (add, relu)]
        node += 3
        if hidden is not None:
            edges += [(1, node), (hidden, node), (node, add)]
            node += 1
        hidden = relu
    return node, edges


def test_shared_weights_need_one_identity_each_not_one_per_step():
    size, edges = recurrent(28)
    breadth_first = conflicts(bipartition._breadth_first(size, sorted(edges)), edges)
    assert len(two_colour(size, edges)[1]) <= 3 < len(breadth_first)


def test_networks():
    # A chain, a diamond and even blocks need none; every odd block needs one.
    assert two_colour(5, [(0, 1), (1, 2), (2, 3), (3, 4)])[1] == []
    assert two_colour(4, [(0, 1), (0, 2), (1, 3), (2, 3)])[1] == []
    assert two_colour(*chain_of_blocks(6, 2))[1] == []
    assert len(two_colour(*chain_of_blocks(6, 3))[1]) == 6
    assert len(two_colour(*chain_of_blocks(6, 1))[1]) == 6
    # One identity serves all readers of its producer: a triangle fan around one node needs one.
    fan = [(0, i) for i in range(1, 9)] + [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert len(two_colour(9, fan)[1]) == 1
    # Nodes without edges, and no nodes at all.
    assert two_colour(3, []) == ([0, 0, 0], [])
    assert two_colour(0, []) == ([], [])


def test_a_deep_network_is_coloured_quickly():
    """Hundreds of odd blocks; and beyond the integer program's limit, by the local search."""
    size, edges = chain_of_blocks(200, 3)
    start = time.perf_counter()
    colours, producers = two_colour(size, edges)
    assert len(producers) == 200
    assert time.perf_counter() - start < 20
    size, edges = chain_of_blocks(2000, 3)
    assert len(edges) > bipartition._MAX_EDGES_EXACT
    colours, producers = two_colour(size, edges)
    assert producers == conflicts(colours, edges)
    assert len(producers) <= 2000
