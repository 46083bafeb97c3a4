"""What `pretraining_run.py` trains on, and what it writes of a run."""
