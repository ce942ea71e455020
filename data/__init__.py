"""From CSV files to batches of token ids."""
