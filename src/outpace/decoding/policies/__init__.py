"""What of a prompt's keys and values is kept: one file a policy."""
