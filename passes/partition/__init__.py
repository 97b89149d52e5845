"""Functions that split a graph into independent graphs."""
