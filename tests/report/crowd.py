"""Candidates that lie as close together as real ones do."""

# name, status, perplexity, its interval, seconds, their interval, bytes: close together, as real candidates are
CROWD = (
    ("0.5", "passed", 1.18, (1.15, 1.21), 0.66, (0.65, 0.71), 0.65),
    ("0.55", "passed", 1.19, (1.16, 1.22), 0.67, (0.64, 0.71), 0.64),
    ("0.7", "missed", 1.90, (1.80, 2.02), 0.61, (0.56, 0.81), 0.50),
    ("2:4", "undecided", 1.63, (1.55, 1.73), 0.66, (0.50, 0.73), 0.65),
    ("4:8", "undecided", 1.62, (1.54, 1.72), 0.655, (0.50, 0.73), 0.65),
    ("shrink:latency=0.8x", "missed", 1.893, (1.77, 2.04), 0.66, (0.57, 1.01), 0.68),
    ("shrink:layers:params=0.8x", "missed", 1.91, (1.79, 2.05), 0.65, (0.6, 0.9), 0.70),
)
