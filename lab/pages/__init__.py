"""What fills the README, docs/ and the notebooks from results/."""
