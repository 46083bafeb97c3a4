"""Parameters of a rank: masters, compute copies and gradients in buckets; who owns them, gathers and reduces them."""
