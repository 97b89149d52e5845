"""Attention calls of a graph in all their forms, and what each computes."""
