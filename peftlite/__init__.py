"""peftlite: parameter-efficient fine-tuning, wrapped or in place."""
