"""`rannc export`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from accelerate.utils import convert_file_size_to_int

from rannc_hf.checkpoint.export_hf import export


def run(arguments: Sequence[str]) -> int:
    """Write the directory."""
    parser = argparse.ArgumentParser(
        prog="rannc export",
        description="Turn a sharded checkpoint into a directory that `from_pretrained` loads. Needs no GPU, no other "
        "process, and memory for one file at a time.",
    )
    parser.add_argument("checkpoint", help="checkpoint written during training, e.g. output/checkpoints/checkpoint_3")
    parser.add_argument("directory", help="where to write; made if it does not exist")
    parser.add_argument("--max-shard-size", default="5GB", help="largest size of a file (default: %(default)s)")
    parser.add_argument("--name", default="model", help="which model of the checkpoint (default: %(default)s)")
    args = parser.parse_args(arguments)
    export(
        args.checkpoint, args.directory, max_shard_size=convert_file_size_to_int(args.max_shard_size), name=args.name
    )
    print(f"wrote {args.directory}")
    return 0
