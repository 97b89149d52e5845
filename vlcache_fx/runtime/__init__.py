"""What happens in every request: runners take specs, named programs and lowered ones, and serve calls.

Arguments of a call go in, results and a report come out. No graphs, torch's or ours. The compiler, the
exporter and the integrations import it."""
