"""Training of the reference VLM: ``python -m examples.train_reference_vlm``."""
