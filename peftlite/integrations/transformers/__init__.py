"""transformers: its layers, what it knows of its models, its own adapter methods, its Trainer."""
