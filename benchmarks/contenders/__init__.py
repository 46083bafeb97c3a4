"""Contenders of `benchmarks/peers.py`: this project and its peers, each training the same model on the same batch."""
