"""What joint training costs: time per update step, and memory."""
