"""A model -> its neural graph.  Knows torch modules; knows nothing of training."""

from .structure import ConstantEdges, EdgeBlock, EdgeType, NeuralGraph, NeuronGroup, Nodes, Symmetry

__all__ = ["ConstantEdges", "EdgeBlock", "EdgeType", "NeuralGraph", "NeuronGroup", "Nodes", "Symmetry"]
