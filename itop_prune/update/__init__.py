"""What an update is made of: when, how many weights, which ones, and what is recorded."""
