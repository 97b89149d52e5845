"""Runs the programs of a decoder graph: binds inputs, plans and donors to them."""
