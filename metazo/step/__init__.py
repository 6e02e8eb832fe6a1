"""The parts of a step: directions, estimators, rules, scales, and the weights that are probed."""
