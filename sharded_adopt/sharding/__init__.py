"""The sharded engine: layout, buffers, collectives and the optimizer in front of them."""
