"""micro: a decoder of 5 M parameters in the shape of Qwen2, pretrained on English and on real instructions."""
