"""The passage graph: which passages lead to which, found in their texts.

`passage_graph.py` says what the edges are, `texts.py` what is read from a text, and `incidence.py`
is how it is stored.
"""

from rlrag.retrieval.graph.passage_graph import EdgeKind as EdgeKind
from rlrag.retrieval.graph.passage_graph import EdgeSource as EdgeSource
from rlrag.retrieval.graph.passage_graph import Neighbours as Neighbours
from rlrag.retrieval.graph.passage_graph import PassageGraph as PassageGraph
