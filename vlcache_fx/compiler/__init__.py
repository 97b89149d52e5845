"""From a traced graph to the callable that replaces it: one file for each kind of graph.

Takes graphs that Dynamo or ``torch.export`` traced; gives callables for requests, and explanations. ``kinds``
has the list of kinds, ``traced`` a graph on its way through, ``regions`` and ``turns`` what Dynamo needs in
addition to a backend. The backend, the API and the exporter import this package.
"""
