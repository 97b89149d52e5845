"""Specs: the compiler's output that serving needs, as frozen dataclasses that JSON can hold.

``compiler/builders`` makes them from graphs; the runtime and exported folders read them. No ``torch.fx``: any
other package may import them, and they import only ``plan`` and ``errors``.
"""
