"""Watches the quality of reuse: shadow runs and what follows from them."""
