"""Tokens: takes nodes; returns the dimension of each value that runs over tokens."""
