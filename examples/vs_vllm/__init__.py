"""The same photo and prompts through this library and vLLM: ``python -m examples.vs_vllm``."""
