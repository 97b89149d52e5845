"""Compares this library with vLLM on the same photos and prompts: ``python -m examples.vs_vllm``."""
