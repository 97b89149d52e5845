"""From a captured graph to what runs in its place: one file for each kind of graph.

Takes a graph that Dynamo or torch.export traced, gives a callable for requests. The backend, the API and
the exporter import it."""
