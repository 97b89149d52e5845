"""Serves calls: runners that are built from specs and programs.

Arguments of a call go in, results and a report come out. No graphs, neither torch's nor ours. The compiler,
the exporter and the integrations import it."""
