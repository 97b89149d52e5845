"""Helpers of passes: insertion of nodes, attention calls and masks. Only passes import them."""
