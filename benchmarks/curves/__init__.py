"""Parts of `benchmarks/loss_curve.py`: the text it trains on, and the picture it draws."""
