"""Compiles a traced graph into the callable that replaces it: one file per kind of graph.

Graphs that Dynamo or ``torch.export`` traced go in; callables and explanations come out. ``kinds`` lists the
kinds, ``traced`` has the graph that they share; ``regions`` and ``turns`` hook into Dynamo's calls. The
backend, the API and the exporter import this package.
"""
