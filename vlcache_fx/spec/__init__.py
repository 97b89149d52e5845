"""What compiling a graph leaves for serving it: frozen dataclasses of plain data that JSON can hold.

The compile side makes them of graphs; the runtime and exported folders read them. No torch.fx: everything may
import it, and it imports only ``plan``."""
