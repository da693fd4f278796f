"""The trainable models, in plain PyTorch."""
