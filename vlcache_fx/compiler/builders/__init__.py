"""From the facts of a captured graph to what serves its calls: specs, named programs, runners.

Each file has builders for one part. They read graph nodes, once per graph; what they give holds none but
inside callables. The backend and the exporter import them."""
