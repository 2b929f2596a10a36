"""CartesianMoE (arXiv 2410.16077) and its rivals: other layers, presets, and their comparison."""
