"""What an approximate method costs in quality: right answers, and how likely the target finds what was written."""
