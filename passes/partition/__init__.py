"""Cuts a graph into graphs that run by themselves."""
