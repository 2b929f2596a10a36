"""What the experiments need around the models: command lines, run folders, figures, statistics, speed."""
