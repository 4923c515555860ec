"""Ways for LoRA's factors on a linear layer to begin, beyond the random ones: from the base weight, or from data."""
