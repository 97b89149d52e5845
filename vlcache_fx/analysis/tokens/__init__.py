"""The token dimension of every tensor, followed through operators."""
