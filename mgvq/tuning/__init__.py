"""What is left open once codes are chosen, moved by gradients: tables, scales, norms, biases; codes stay as they are."""
