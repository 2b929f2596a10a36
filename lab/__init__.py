"""What experiments need around the models: tools, scores, both papers, checkpoints, speed."""
