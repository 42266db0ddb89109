"""What a finished run shows: its page, its pictures, and tables over several runs."""
