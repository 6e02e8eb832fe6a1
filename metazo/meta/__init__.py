"""Meta-training: learning a tuner's networks along the path of a first-order teacher."""
