"""Hyper-connections for PyTorch, made for torch.compile."""
