"""The doors: how training scripts, written for accelerate alone, come to run on the engine."""
