"""Runtime: what happens in every request."""
