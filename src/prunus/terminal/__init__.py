"""What people read on the terminal; the figures are those of the JSON on stdout."""
