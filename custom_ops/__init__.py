"""hc:: ops: hyper-connection mathematics on tensors, one file an op."""
