"""Monitors the quality of reuse: shadow runs, and the models that they bypass."""
