"""What one update of the masks is made of: when, how many weights, which ones, and what is remembered."""
