"""Attention calls in a graph: which there are, and what each computes, in whatever form it is written."""
