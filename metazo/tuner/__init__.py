"""A tuner: its file, its networks, its match with a model, and the block scale that it computes."""
