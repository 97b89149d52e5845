"""The token axis of every tensor, followed through operators."""
