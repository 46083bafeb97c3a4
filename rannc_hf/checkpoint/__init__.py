"""Checkpoint: state under Hugging Face names, from any plan to any other."""

from rannc_hf.checkpoint.directory import Staging, latest, read_manifest, staged, verify
from rannc_hf.checkpoint.load import load, load_from, load_weights_from
from rannc_hf.checkpoint.optimizer import full_optimizer_state_dict, load_full_optimizer_state_dict
from rannc_hf.checkpoint.pretrained import save_pretrained
from rannc_hf.checkpoint.save import save, save_into

__all__ = [
    "Staging",
    "full_optimizer_state_dict",
    "latest",
    "load",
    "load_from",
    "load_full_optimizer_state_dict",
    "load_weights_from",
    "read_manifest",
    "save",
    "save_into",
    "save_pretrained",
    "staged",
    "verify",
]
