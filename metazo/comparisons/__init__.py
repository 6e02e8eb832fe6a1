"""Fair comparison of methods: a learning-rate search for each, then seeds, at equal forward passes and equal time."""
