"""What a step is made of: directions, estimators, rules, scales, and the weights that are probed."""
