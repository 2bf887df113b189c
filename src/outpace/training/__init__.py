"""Small networks that draft, trained on what the target itself writes: its texts, its hidden states, heads."""
