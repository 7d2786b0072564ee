"""Loadstone loads any PyTorch model onto the machine you have."""
