"""What a finished run leaves: report, plots, comparison, the exported model."""
