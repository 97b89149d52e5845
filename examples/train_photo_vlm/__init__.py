"""Training of the photo VLM: ``python -m examples.train_photo_vlm``."""
