"""From a program to a graph of constraints: `build_graph(program, splitting, fallback)`.

A node is a rule with slots, which hold copies of variables. `bipartite` puts the nodes in two
groups that share no variable.
"""

from __future__ import annotations

from pjax.graph.bipartition import bipartite as bipartite
from pjax.graph.bipartition import ends_of as ends_of
from pjax.graph.build import build_graph as build_graph
from pjax.graph.graph import WHOLE as WHOLE
from pjax.graph.graph import Ends as Ends
from pjax.graph.graph import Graph as Graph
from pjax.graph.graph import Node as Node
from pjax.graph.graph import Slot as Slot
from pjax.graph.graph import feeds_thresholds as feeds_thresholds
from pjax.graph.graph import latent_nodes as latent_nodes
from pjax.graph.messages import CustomRuleWarning as CustomRuleWarning
from pjax.graph.messages import UnusedParameterWarning as UnusedParameterWarning
from pjax.graph.messages import honoured as honoured
from pjax.graph.messages import unused as unused
from pjax.graph.messages import warn as warn
