"""Figures of a problem: what they show is what the problem has, and names do not overlap."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import pjax
from pjax.inspection import label
from pjax.lab import problem_plots
from pjax.problem import Formulation, Layout, layout, sizes
from pjax.trace import trace
from tests.selection import mostly_slow


def problem_of(network: Any, params: Any, splitting: Any = "neuron") -> Layout:
    metric = pjax.metrics.Uniform() if splitting == "neuron" else pjax.metrics.Spectral()
    labels = jax.nn.one_hot(jnp.arange(4), 6)
    program = trace(lambda p: pjax.cross_entropy(network(p), labels), params)[0]
    return layout(program, Formulation(metric, splitting=splitting))


def chain(depth: int, skip: int = 0, **options: Any) -> Layout:
    """Layers of six; each `skip`-th adds what it read before."""
    params = [{"w": jnp.ones((6, 6)), "b": jnp.zeros(6)} for _ in range(depth)]

    def network(params: Any) -> Any:
        hidden = jnp.ones((4, 6))
        for number, one in enumerate(params):
            new = jax.nn.relu(hidden @ one["w"] + one["b"])
            hidden = hidden + new if skip and number % skip == skip - 1 else new
        return hidden

    return problem_of(network, params, **options)


def loop(steps: int) -> Layout:
    params = {"u": jnp.ones((6, 6)), "w": jnp.ones((6, 6)), "b": jnp.zeros(6)}

    def network(params: Any) -> Any:
        def body(hidden: Any, x: Any) -> Any:
            return jnp.tanh(x @ params["u"] + hidden @ params["w"] + params["b"]), None

        return jax.lax.scan(body, jnp.zeros((4, 6)), jnp.ones((steps, 4, 6)))[0]

    return problem_of(network, params)


def axes_of(figure: Figure) -> list[Any]:
    """Its axes, of whose contents Matplotlib's types say little."""
    return list(figure.axes)


def texts(figure: Figure) -> list[str]:
    """What a figure says, in the order in which it was drawn."""
    return [one.get_text() for axes in figure.axes for one in axes.texts]


def bounds(figure: Figure, artists: Any) -> list[Any]:
    """The places of artists, in pixels."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    return [one.get_window_extent(renderer) for one in artists]


def test_layers_are_chains_and_hold_every_node_once() -> None:
    graph = chain(6, skip=2).graph
    layers = problem_plots.layers(graph)
    drawn = sorted(node.index for layer in layers for node in layer.nodes)
    assert drawn == [node.index for node in graph.nodes if node.kind != "parameter"]
    # Where a sum follows, the layer's output has one reader, else it is a fork's.
    names = [tuple(n.name for n in layer.nodes if n.kind != "identity") for layer in layers]
    assert names[:3] == [("dot", "sum_relu"), ("dot", "sum_relu"), ("add",)]
    assert names[-1] == ("cross_entropy",)
    assert layers[2].reads == (0, 1)
    assert layers[3].reads == (2,)
    assert [node.name for node in layers[1].parameters] == ["[1]['w']", "[1]['b']"]
    assert all(read < number for number, layer in enumerate(layers) for read in layer.reads)


def test_the_steps_of_a_loop_are_one_layer_that_reads_itself() -> None:
    layers = problem_plots.layers(loop(12).graph)
    assert len(layers) == 4
    dots, weights, adds, loss = layers
    assert [layer.count for layer in layers] == [12, 12, 12, 1]
    assert adds.reads == (0, 1)
    assert weights.reads == (2,)
    assert (dots.reads, loss.reads) == ((), (2,))
    figure = problem_plots.draw_graph(loop(12).graph, "layers")
    assert "12 × add, tanh" in texts(figure)


def test_a_very_deep_graph_is_drawn_by_source_line(monkeypatch) -> None:
    graph = chain(20).graph
    assert len(problem_plots.layers(graph)) == 21
    monkeypatch.setattr(problem_plots, "_ROWS", 20)
    layers = problem_plots.layers(graph)
    assert [layer.count for layer in layers] == [20, 1]
    assert layers[0].reads == (0,)


@pytest.mark.parametrize("splitting", mostly_slow(["neuron", "layer"], quick=["neuron"]))
def test_a_graph_is_whole_if_it_is_small(splitting) -> None:
    small, large = chain(2, splitting=splitting).graph, chain(14, splitting=splitting).graph
    assert len(small.nodes) < 40 < len(large.nodes)
    shown = texts(problem_plots.draw_graph(small))
    assert {str(node.index) for node in small.nodes} <= set(shown)
    shown = texts(problem_plots.draw_graph(large))
    colours = [one for one in shown if one in ("A", "B")]
    drawn = [node for layer in problem_plots.layers(large) for node in layer.nodes]
    assert colours == [node.colour for node in drawn]
    assert "13.w, 13.b" in shown
    whole = problem_plots.draw_graph(large, "nodes")
    assert str(large.nodes[-1].index) in texts(whole)


def test_rows_of_layers_do_not_overlap() -> None:
    figure = problem_plots.draw_graph(chain(14, skip=3).graph)
    boxes = bounds(figure, figure.axes[0].texts)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    right = figure.get_figwidth() * figure.dpi
    assert all(box.x0 >= 0 and box.x1 <= right for box in boxes)


@pytest.mark.parametrize("depth", mostly_slow([2, 24], quick=[2]))
def test_bars_of_memory_add_up(depth) -> None:
    found = sizes(chain(depth))
    figure = problem_plots.memory_by_node(found, "batches of 4")
    (axes,) = axes_of(figure)
    bars = [bar.get_width() for bar in axes.patches]
    assert sum(bars) == found.bytes
    assert len(bars) == min(40, sum(node.bytes > 0 for node in found.nodes))
    assert axes.get_title(loc="left").startswith("batches of 4: ")
    # A product of two variables has copies, and the text beside the bar says what they would take.
    assert any("with every copy" in one for one in texts(figure)) == (depth > 1)
    boxes = bounds(figure, axes.texts)
    assert all(box.x1 <= figure.get_figwidth() * figure.dpi for box in boxes)


def profile(steps: int, nodes: int) -> pjax.Profile:
    names = tuple(f"{number} ['block{number}']['kernel']" for number in range(nodes))
    residual = 10.0 ** -jnp.linspace(0, 4, nodes) * jnp.linspace(1, 0.1, steps)[:, None]
    return pjax.Profile(names, residual, residual.at[:, -1].set(0.0))


def test_few_nodes_are_lines() -> None:
    found = profile(20, 5)
    (axes,) = axes_of(problem_plots.residual_by_node(found))
    assert [line.get_label() for line in axes.lines] == [f"{n} block{n}.kernel" for n in range(5)]
    np.testing.assert_allclose(axes.lines[2].get_ydata(), found.residual[:, 2])
    assert axes.get_yscale() == "log"
    colours = {line.get_color() for line in axes.lines}
    markers = {line.get_marker() for line in axes.lines}
    assert len(colours) == len(markers) == 5


@pytest.mark.parametrize("nodes", mostly_slow([9, 100, 400], quick=[100]))
def test_many_nodes_are_rows_whose_names_can_be_read(nodes) -> None:
    found = profile(20, nodes)
    figure = problem_plots.residual_by_node(found)
    axes = axes_of(figure)[0]
    (image,) = axes.images
    wanted = np.log10(np.asarray(found.residual.T[:-1]))
    np.testing.assert_allclose(np.ma.getdata(image.get_array())[:-1], wanted, atol=1e-5)
    # What is 0 has no colour.
    assert np.ma.getmaskarray(image.get_array())[-1].all()
    labels = axes.get_yticklabels()
    boxes = bounds(figure, labels)
    assert len(labels) == (nodes if nodes <= 150 else -(-nodes // 3))
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    # The losses, which come first, are at the top.
    assert boxes[0].y0 > boxes[-1].y0
    assert min(box.height for box in boxes) > 6


def test_one_step_is_a_mark_for_each_node() -> None:
    found = profile(1, 30)
    (axes,) = axes_of(problem_plots.residual_by_node(found, "a title"))
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xdata()[:-1], found.residual[0, :-1])
    assert np.isnan(line.get_xdata()[-1])
    assert axes.get_xscale() == "log"
    nothing = pjax.Profile(found.names, found.residual * 0, found.residual * 0)
    assert problem_plots.residual_by_node(nothing).axes[0].get_xscale() == "linear"


def test_displacements_are_relative_to_their_parameters() -> None:
    params = {"a": jnp.full((3, 4), 2.0), "b": {"c": jnp.arange(5.0)}, "zero": jnp.zeros(2)}
    moved = jax.tree.map(lambda leaf: 0.1 * leaf + 0.01, params)
    gradient = jax.tree.map(lambda leaf: 3 * leaf, params)
    (axes,) = axes_of(problem_plots.displacement_by_layer(params, moved, gradient))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b.c", "zero"]
    first, second = (line.get_xdata() for line in axes.lines)
    numbers = np.arange(5.0)
    share = np.linalg.norm(0.1 * numbers + 0.01) / np.linalg.norm(numbers)
    assert first[:2] == pytest.approx([0.105, share], rel=1e-5)
    assert second[:2] == pytest.approx([3, 3], rel=1e-5)
    assert np.isnan(first[2])
    (axes,) = axes_of(problem_plots.displacement_by_layer(params, moved))
    assert len(axes.lines) == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("['dense.0.weight']", "dense.0.weight"),
        ("['blocks'][0]['b1']['bias'].value", "blocks.0.b1.bias"),
        ("[1]['w']", "1.w"),
        (".layers[0].weight", "layers.0.weight"),
        ("sum_relu", "sum_relu"),
    ],
)
def test_names_are_those_that_people_write(name, shown) -> None:
    assert label(name) == shown
