"""Kernels of our own, one platform a file, each behind the signature of its plain-XLA reference."""
