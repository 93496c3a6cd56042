"""Small, honest training runs: what sharing heads costs in quality."""
