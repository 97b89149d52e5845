"""Training of the hybrid VLM: ``python -m examples.train_hybrid_vlm``."""
