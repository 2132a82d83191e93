"""Accuracy, paired differences, ablation sweeps, generation and the measurement of speed."""
