"""What every room uses: documents on disk, seeds, sizes, plots. It knows nothing of pruning."""
