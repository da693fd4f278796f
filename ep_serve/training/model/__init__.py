"""The models that are trained, in plain differentiable PyTorch."""
