"""Adapters to model libraries: transformers and its processors, PEFT, accelerate."""
