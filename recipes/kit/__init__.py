"""What the recipes share: data, tokenizers, the arms of a comparison, FLOP counts, tables, plots and result files."""
