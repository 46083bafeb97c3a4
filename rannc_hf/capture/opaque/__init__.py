"""Parts of a model that cannot be captured run as they are, as one operation of the graph: see docs/capture.md."""
