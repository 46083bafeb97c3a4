"""Every model type of the installed Transformers, trained plainly and in stages: see `benchmarks/compatibility.py`."""
