"""From the arguments of a call to a request: spans, positions, masks, blocks and their keys."""
