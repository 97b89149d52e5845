"""Partition: takes a graph, returns graphs that run by themselves, such as an encoder and its decoder."""
