"""The same photo and prompts through this library and through vLLM, side by side."""
