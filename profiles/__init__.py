"""Capture traces of training steps and compare the kernels they launched."""
