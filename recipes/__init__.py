"""The recipes as a package of data, so that an installed runner finds them by name."""
