"""`rannc report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rannc_hf.capture.graph import Graph
from rannc_hf.cli.model import add_model_options, unpadded_graph
from rannc_hf.report import command


def run(arguments: Sequence[str]) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(
        prog="rannc report",
        description="Write a plan as a page for a browser. The plan file is enough; with --cluster the page shows "
        "memory limits, with the model (options as for `rannc plan`) names, sizes and times of its blocks too.",
    )
    command.add_arguments(parser)
    add_model_options(parser, required=False)
    return command.run(parser.parse_args(arguments), _graph)


def _graph(args: argparse.Namespace) -> Graph:
    return unpadded_graph(args).graph
