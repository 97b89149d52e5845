"""What compiling a graph leaves for serving it: frozen dataclasses of plain data that JSON can hold.

Analysis and passes make them; the runtime and exported folders read them. No ``torch.fx``: any other package
may import them, and they import only ``plan`` and ``errors``.
"""
