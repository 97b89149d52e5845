"""Plain data that crosses from the compile half to the serve half.

Analysis and passes make it; the runtime and exported folders read it. It imports neither ``torch.fx`` nor
anything of this package but ``errors``, and any other package may import it.
"""
