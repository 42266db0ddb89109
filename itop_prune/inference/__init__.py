"""After training: masked models computed with their active weights alone."""
