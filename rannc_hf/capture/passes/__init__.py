"""Graph passes: each file holds one small rewrite of the exported operations."""
